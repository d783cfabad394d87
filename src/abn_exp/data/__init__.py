"""Data sets: the facts of each, their conversion into one file, batches on the device."""

"""Trained networks as files for other engines. Importing this package imports no torch."""

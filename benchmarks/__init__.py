"""Speed of training beside a conventional training loop, on the same device and in the same process."""

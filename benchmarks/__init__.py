"""How fast training is, beside a conventional training loop on the same device, in the same process."""

"""Random generators of a run: one for each purpose, a pure function of (seed, purpose, epoch).

This pairs two runs of one seed: an extra draw in one of them (an initial weight, a dropout mask) does not shift the
draws of the other. It also makes resuming exact: no generator has a state to save.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """Return a 63-bit seed that depends on all three arguments and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """Return a fresh CPU generator for one purpose ("order", "crop", "flip", "split", ...) in one epoch."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, epoch))

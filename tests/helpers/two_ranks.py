"""One training step of every norm in two processes that share a batch: `two_ranks.py RANK PORT FOLDER`."""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abn_exp.norm import AttentionBatchNorm2d, InstanceEnhancementBatchNorm2d, SynchronizedStatistics

LAYERS = {
    "torch": lambda: nn.BatchNorm2d(3),
    "torch1d": lambda: nn.BatchNorm1d(3),
    "abn": lambda: AttentionBatchNorm2d(3),
    "abn_gate": lambda: AttentionBatchNorm2d(3, scale="gate"),
    "abn_biased": lambda: AttentionBatchNorm2d(3, unbiased=False),
    "iebn": lambda: InstanceEnhancementBatchNorm2d(3),
}


def batch_of(name: str) -> tuple[Tensor, Tensor]:
    """Six images and the weights of a loss; far from zero, so that a careless variance would show."""
    torch.manual_seed(1)
    shape = (6, 3) if name == "torch1d" else (6, 3, 2, 5)
    return 100 + 3 * torch.randn(shape), torch.randn(shape)


def step(layer: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output, gradients of the input and of the parameters, and statistics after one training step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers() if buffer.is_floating_point()}


def main(rank: int, port: str, out: str) -> None:
    """One of two processes, with an unequal share of each batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    found = {}
    for name, make in LAYERS.items():
        x, weights = batch_of(name)
        torch.manual_seed(2)
        with SynchronizedStatistics():
            found[name] = step(make(), x[mine], weights[mine])
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

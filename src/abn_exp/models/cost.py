"""Parameters, bytes and multiply-accumulates of a network, binary and real counted apart."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.errors import ConfigError


@dataclass(frozen=True)
class LayerSummary:
    """One layer that holds parameters. MACs are those of one image's forward pass."""

    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int
    binary_parameters: int
    bytes_real: int  # all parameters as float32
    bytes_packed: int  # one bit a binary weight (whole bytes a layer), float32 for the rest
    binary_macs: int
    real_macs: int


@dataclass(frozen=True)
class NetworkSummary:
    """The layers in the order they run. Norms' element-wise work and running statistics are not counted."""

    layers: tuple[LayerSummary, ...]

    @property
    def totals(self) -> dict[str, int]:
        """The sums over all layers: total, binary (parameters), bytes_real, bytes_packed, binary_macs, real_macs."""
        names = {"total": "parameters", "binary": "binary_parameters"}
        names |= {name: name for name in ("bytes_real", "bytes_packed", "binary_macs", "real_macs")}
        return {key: sum(getattr(layer, name) for layer in self.layers) for key, name in names.items()}

    def table(self) -> Table:
        """Return the summary as a table for a terminal of 80 columns, with the totals in its last row."""
        totals = self.totals
        caption = f"{totals['bytes_real'] / 1e6:.1f} MB as float32, {totals['bytes_packed'] / 1e6:.1f} MB packed"
        table = Table(box=SIMPLE, padding=0, caption=caption)
        for heading in ("layer", "output"):
            table.add_column(heading, no_wrap=True)
        for heading in ("params", "one-bit", "MB\npacked", "binary\nMMAC", "real\nMMAC"):
            table.add_column(heading, justify="right", vertical="bottom")
        for layer in self.layers:
            shape = "x".join(str(size) for size in layer.output_shape)
            table.add_row(layer.name, shape, *_cells(vars(layer)))
        table.add_section()
        named = {**totals, "parameters": totals["total"], "binary_parameters": totals["binary"]}
        table.add_row("total", "", *_cells(named))
        return table


def _cells(numbers: dict[str, Any]) -> list[str]:
    counts = [f"{numbers[key]:,}" for key in ("parameters", "binary_parameters")]
    millions = (numbers[key] / 1e6 for key in ("bytes_packed", "binary_macs", "real_macs"))
    return counts + [f"{number:,.3f}" if number < 100 else f"{number:,.1f}" for number in millions]


def summarize(network: nn.Module, image_size: int) -> NetworkSummary:
    """Count what `network` holds and does for one image (3, image_size, image_size).

    Runs one forward pass in evaluation mode without gradients; buffers, generators and every module's training flag
    are afterwards as they were. Works on the meta device, too. A layer that is used several times has a row for each,
    its parameters in the first; one that is not used by a call of its own has one without an output.

    Raises ConfigError where the network's output is not one row of logits an image.
    """
    layers: list[LayerSummary] = []
    seen: set[int] = set()  # parameters that are counted

    def record(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        own = {id(parameter): parameter.numel() for parameter in layer.parameters(recurse=False)}
        parameters = sum(count for key, count in own.items() if key not in seen)
        latent = layer.weight if isinstance(layer, BinaryConv2d | BinaryLinear) else None
        binary = latent.numel() if latent is not None and parameters else 0
        seen.update(own)
        macs = 0
        if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(output, Tensor):
            macs = output[0].numel() * layer.weight[0].numel()
        layers.append(
            LayerSummary(
                name=name,
                kind=type(layer).__name__,
                output_shape=tuple(output.shape[1:]) if isinstance(output, Tensor) else (),
                parameters=parameters,
                binary_parameters=binary,
                bytes_real=4 * parameters,
                bytes_packed=math.ceil(binary / 8) + 4 * (parameters - binary),
                binary_macs=0 if latent is None else macs,
                real_macs=macs if latent is None else 0,
            )
        )

    training = {module: module.training for module in network.modules()}
    weight = next(network.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad(), ExitStack() as hooks:
            for name, module in network.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    hooks.enter_context(module.register_forward_hook(partial(record, name)))
            output = network.eval()(image)
    finally:
        for module, flag in training.items():
            module.training = flag
    if not isinstance(output, Tensor) or output.dim() != 2:
        found = f"one of {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigError(f"a network should return a tensor (images, classes) of logits; this one returns {found}.")
    for name, module in network.named_modules():
        if any(id(parameter) not in seen for parameter in module.parameters(recurse=False)):
            record(name, module, None, None)
    return NetworkSummary(tuple(layers))

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.measure import Measurement
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from abn_exp import models
from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.errors import ConfigError
from abn_exp.models.cost import LayerSummary, summarize
from abn_exp.norm import AttentionBatchNorm2d


def on_meta(name: str, image_size: int = 32, num_classes: int = 10, **arguments: Any) -> Any:
    with torch.device("meta"):
        return getattr(models, name)(num_classes, image_size, AttentionBatchNorm2d, **arguments)


def macs(layer: LayerSummary) -> tuple[int, int]:
    return layer.binary_macs, layer.real_macs


def test_a_network_counted_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),  # 108 weights, 8 x 8 positions
        AttentionBatchNorm2d(4),  # 4 shifts
        BinaryConv2d(4, 6, 3, stride=2, padding=1),  # 216 bits = 27 bytes, 4 x 4 positions
        nn.Flatten(),
        BinaryLinear(96, 3, bias=True),  # 288 bits = 36 bytes, and 3 real biases
        nn.Linear(3, 2),  # 6 + 2
    )
    summary = summarize(network, image_size=8)
    rows = [
        (r.name, r.kind, r.output_shape, r.parameters, r.binary_parameters, r.bytes_packed, *macs(r))
        for r in summary.layers
    ]
    assert rows == [
        ("0", "Conv2d", (4, 8, 8), 108, 0, 432, 0, 108 * 64),
        ("1", "AttentionBatchNorm2d", (4, 8, 8), 4, 0, 16, 0, 0),
        ("2", "BinaryConv2d", (6, 4, 4), 216, 216, 27, 216 * 16, 0),
        ("4", "BinaryLinear", (3,), 291, 288, 36 + 12, 288, 0),
        ("5", "Linear", (2,), 8, 0, 32, 0, 6),
    ]
    assert summary.totals == {
        "total": 627,
        "binary": 504,
        "bytes_real": 4 * 627,
        "bytes_packed": 432 + 16 + 27 + 48 + 32,
        "binary_macs": 216 * 16 + 288,
        "real_macs": 108 * 64 + 6,
    }


def test_bits_are_packed_into_whole_bytes() -> None:
    assert summarize(nn.Sequential(BinaryConv2d(3, 1, 1), nn.Flatten()), 4).totals["bytes_packed"] == 1


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("name", ["binarynet", "vgg_small", "resnet18", "resnet18_paper"])
def test_macs_are_half_of_what_torch_counts(name: str, image_size: int) -> None:
    network = on_meta(name, image_size)
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, image_size, image_size, device="meta"))
    totals = summarize(network, image_size).totals
    assert 2 * (totals["binary_macs"] + totals["real_macs"]) == counter.get_total_flops()
    assert totals["total"] == sum(p.numel() for p in network.parameters())
    assert totals["bytes_real"] == 4 * totals["total"]


@pytest.mark.parametrize(
    ("name", "gmacs", "real_gmacs", "binary"),
    [("binarynet", 4.550, 0.011, 36_421_632), ("resnet18_paper", 0.6576, 0.0022, 4_326_400)],
)
def test_the_published_networks(name: str, gmacs: float, real_gmacs: float, binary: int) -> None:
    totals = summarize(on_meta(name), 32).totals
    assert (totals["binary_macs"] + totals["real_macs"]) / 1e9 == pytest.approx(gmacs, abs=5e-4)
    assert totals["real_macs"] / 1e9 == pytest.approx(real_gmacs, abs=5e-4)
    assert totals["binary"] == binary
    assert totals["bytes_packed"] == binary // 8 + 4 * (totals["total"] - binary)


def test_summarize_leaves_no_trace() -> None:
    network = models.vgg_small(10, 16, nn.BatchNorm2d, width=0.1)
    network.get_submodule("layer2").eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    rng = torch.get_rng_state()
    summarize(network, 16)
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_hooks for module in network.modules())


def test_summarize_restores_the_network_after_an_error() -> None:
    network = models.vgg_small(10, 16, nn.BatchNorm2d, width=0.1)
    with pytest.raises(RuntimeError):
        summarize(network, 32)
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_table_shows_every_layer_and_the_totals() -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    summary = summarize(on_meta("binarynet"), 32)
    console.print(summary.table())
    lines = console.export_text().splitlines()
    assert all(any(layer.name in line for line in lines) for layer in summary.layers)
    (total,) = [line for line in lines if "total" in line]
    assert "36,421,632" in total
    assert f"{summary.totals['total']:,}" in total
    assert f"{summary.totals['bytes_packed'] / 1e6:.3f}" in total
    assert any(f"{4 * summary.totals['total'] / 1e6:.1f} MB" in line for line in lines)


@pytest.mark.parametrize("name", ["binarynet", "vgg_small", "resnet18", "resnet18_paper"])
def test_table_fits_a_terminal_of_80_columns(name: str) -> None:
    console = Console(width=200)
    table = summarize(on_meta(name), 32).table()
    assert Measurement.get(console, console.options, table).maximum <= 80


class Shared(nn.Module):
    """A PReLU that is used twice, a layer that nothing calls, and a pair as the output of a layer with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.PReLU(4)
        self.attention, self.unused = nn.MultiheadAttention(4, 1), BinaryConv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.act(self.conv(x))).flatten(2).transpose(1, 2)
        return F.conv2d(self.attention(x, x, x)[0].mT[..., None], self.unused.weight).mean((2, 3))


def test_each_parameter_is_counted_once() -> None:
    network = Shared()
    summary = summarize(network, 8)
    assert summary.totals["total"] == sum(p.numel() for p in network.parameters())
    assert summary.totals["binary"] == 16
    rows = [(layer.name, layer.parameters) for layer in summary.layers if layer.name in ("act", "unused")]
    assert rows == [("act", 4), ("act", 0), ("unused", 16)]


def test_what_gives_no_logits_is_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), self.conv(x)

    with pytest.raises(ConfigError, match=r"a network should return a tensor .* this one returns a tuple"):
        summarize(TwoHeads(), 4)
    with pytest.raises(ConfigError, match=r"this one returns one of \[1, 2, 1, 1\]"):
        summarize(nn.Conv2d(3, 2, 4), 4)

"""The analysis of binary activations: against closed forms, brute force and hand numbers; then end to end."""

import csv
import math
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.stats import norm as normal
from torch import Tensor, nn

from abn_exp.analysis import activation_report, activations
from abn_exp.analysis.activations import (
    GRID,
    SILU_MINIMUM,
    WIDE,
    band_shares,
    beyond_one_threshold,
    check_places,
    drawn_part,
    entropy,
    imbalance,
    learned_norm,
    measure,
    places,
    response,
)
from abn_exp.binarize import BinaryConv2d, SignZero
from abn_exp.models import binarynet, resnet18_paper
from abn_exp.models.build import initialize_
from abn_exp.norm import AttentionBatchNorm2d, InstanceEnhancementBatchNorm2d
from tests.helpers.scripts import analyze, files

BETAS = [-1.0, 0.0, 0.1, 0.3]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def roots(beta: float) -> tuple[float, float]:
    """Where SiLU(x) + beta changes its sign; -inf for the lower one where there is one threshold."""
    upper = brentq(lambda x: silu(x) + beta, -1.27846, 20)
    return (brentq(lambda x: silu(x) + beta, -50, -1.27846) if beta > 0 else -math.inf), upper


def p_plus(beta: float) -> float:
    """P(SiLU(x) + beta >= 0) for a standard normal x."""
    if beta >= -SILU_MINIMUM:
        return 1.0
    lower, upper = roots(beta)
    return 1 - (normal.cdf(upper) - normal.cdf(lower))


def abn(betas: list[float], **options: Any) -> AttentionBatchNorm2d:
    """An ABN that standardises nothing away: mean 0, variance 1."""
    layer = AttentionBatchNorm2d(len(betas), **options).eval()
    assert layer.bias is not None
    assert layer.running_var is not None
    layer.bias.data = torch.tensor(betas)
    layer.running_var.fill_(1 - layer.eps)
    return layer


def normal_images(channels: int, count: int = 250, size: int = 400) -> torch.Tensor:
    """Images whose every channel holds the quantiles of the standard normal distribution, once."""
    n = count * size
    x = torch.tensor(normal.ppf((np.arange(n) + 0.5) / n), dtype=torch.float32)
    return x.view(count, 1, 1, size).expand(-1, channels, -1, -1).contiguous()


def test_entropy_and_imbalance_by_hand() -> None:
    p = [0.0, 0.25, 0.5, 1.0]
    np.testing.assert_allclose(entropy(p), [0, 2 - 0.75 * math.log2(3), 1, 0], atol=1e-12)
    np.testing.assert_allclose(imbalance(p), [1, 0.5, 0, 1])


def test_p_plus_is_that_of_the_thresholds() -> None:
    network = nn.Sequential(abn(BETAS), nn.Hardtanh(inplace=True), BinaryConv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1))
    found, _ = measure(network, normal_images(4))
    output, binary = found
    expected = [p_plus(beta) for beta in BETAS]
    assert (output.kind, binary.kind) == ("norm output", "binary input")
    np.testing.assert_allclose(binary.p_plus, expected, atol=2e-5)
    np.testing.assert_allclose(output.p_plus, expected, atol=2e-5)
    scores = binary.scores()
    assert scores["imbalance_of_channels"] == pytest.approx(np.mean(np.abs(2 * np.array(expected) - 1)), abs=1e-4)
    assert scores["imbalance_of_layer"] == pytest.approx(abs(2 * np.mean(expected) - 1), abs=1e-4)
    assert scores["constant_channels"] == 0.25  # beta = 0.3 alone


def test_minus_one_is_the_third_value_of_the_published_sign() -> None:
    from abn_exp.binarize import Binarization

    zeros = torch.zeros(1, 1, 4, 4)
    expectations: dict[SignZero, float] = {"plus": 1.0, "zero": 0.0}
    for sign_zero, expected in expectations.items():
        layer = BinaryConv2d(1, 1, 1, binarization=Binarization(sign_zero=sign_zero))
        (found,), _ = measure(nn.Sequential(layer), zeros)
        assert found.p_plus == [expected]


def test_streamed_is_unstreamed() -> None:
    network = initialize_(binarynet(10, 16, AttentionBatchNorm2d, width=0.0625), 0).eval()
    for module in network.modules():
        if isinstance(module, AttentionBatchNorm2d):
            module.bias.data.uniform_(-0.2, 0.3, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2 * activations.BATCH + 30, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    inputs: dict[str, torch.Tensor] = {}
    for name in ("layer3.conv", "head.1"):
        network.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: inputs.__setitem__(name, args[0].clone())
        )
    found, predicted = measure(network, images)
    with torch.no_grad():
        assert torch.equal(network(images).argmax(1), predicted)
    by_name = {place.name: place for place in found}
    x = inputs["layer3.conv"]
    np.testing.assert_allclose(by_name["layer3.conv"].p_plus, (x >= 0).double().mean((0, 2, 3)))
    histogram = np.histogram(x.numpy(), activations.EDGES)[0]
    assert by_name["layer3.conv"].histogram.sum() == histogram.sum() == x.numel()
    assert abs(by_name["layer3.conv"].histogram.numpy() - histogram).sum() <= 4  # values on an edge
    # A flattened map of 32 channels of 2 x 2 keeps its channels.
    y = inputs["head.1"].view(len(images), -1, 4)
    np.testing.assert_allclose(by_name["head.1"].p_plus, (y >= 0).double().mean((0, 2)))


def test_places_of_a_residual_network() -> None:
    network = resnet18_paper(10, 32, AttentionBatchNorm2d, width=0.5).eval()
    found = places(network, torch.zeros(1, 3, 32, 32))
    binary = [place.name for place in found.values() if place.kind == "binary input"]
    assert "layer2.0.shortcut.0" not in binary  # it binarizes what layer2.0.conv1 does
    assert {"layer2.0.conv1", "layer2.0.conv2", "layer3.1.conv2"} <= set(binary)
    assert len(binary) == 12
    assert all(place.feature_map for place in found.values())


def test_a_head_s_own_norm_is_told_apart() -> None:
    found = places(binarynet(10, 16, nn.BatchNorm2d, width=0.0625).eval(), torch.zeros(1, 3, 16, 16))
    assert [name for name, place in found.items() if not place.feature_map] == ["head.4"]


def test_response_is_the_norm_s_formula() -> None:
    layer = abn(BETAS)
    layer.get_buffer("running_mean").uniform_(-3, 3)
    layer.get_buffer("running_var").uniform_(0.1, 9)
    expected = GRID / (1 + np.exp(-GRID)) + np.array(BETAS, np.float32)[:, None]
    np.testing.assert_allclose(response(layer), expected, atol=1e-12)
    plain = nn.BatchNorm2d(2)
    plain.weight.data = torch.tensor([2.0, -0.5])
    plain.get_buffer("running_mean").fill_(7)
    np.testing.assert_allclose(response(plain), [2 * GRID, -0.5 * GRID], atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        AttentionBatchNorm2d(400),
        AttentionBatchNorm2d(400, gate="forward"),
        AttentionBatchNorm2d(400, gate="backward"),
        AttentionBatchNorm2d(400, gate="none"),
        AttentionBatchNorm2d(400, scale="output"),
        AttentionBatchNorm2d(400, scale="gate"),
        AttentionBatchNorm2d(400, shift=False),
        nn.BatchNorm2d(400),
    ],
    ids=str,
)
def test_bands_against_counted_sign_changes(layer: nn.BatchNorm2d) -> None:
    random = torch.Generator().manual_seed(0)
    if layer.bias is not None:
        layer.bias.data = torch.empty(400).uniform_(-0.5, 0.5, generator=random)
    if layer.weight is not None:
        layer.weight.data = torch.randn(400, generator=random).sign() * torch.empty(400).uniform_(
            0.8, 1.5, generator=random
        )
        layer.weight.data[0] = 0.0
    y = response(layer, np.linspace(-15, 15, 20_001))
    y[np.abs(y) < 1e-9] = 0.0
    changes = (np.diff(y >= 0, axis=1) != 0).sum(1)
    brute = {
        "one threshold": np.mean(changes == 1),
        "two thresholds": np.mean(changes == 2),
        "always +1": np.mean((changes == 0) & (y[:, 0] >= 0)),
        "always -1": np.mean((changes == 0) & (y[:, 0] < 0)),
    }
    assert band_shares(layer) == pytest.approx(brute)


def test_response_curves_are_drawn_as_far_as_there_are_thresholds() -> None:
    def ends(betas: list[float]) -> tuple[float, float]:
        x = GRID[drawn_part(response(abn(betas)) >= 0)]
        return float(x[0]), float(x[-1])

    step = float(GRID[1] - GRID[0])
    assert ends([-1.0, 0.25]) == (-4, 4)  # roots(0.25) are inside
    lower = roots(0.01)[0]
    assert lower < -6
    assert ends([-1.0, 0.01, 0.25]) == pytest.approx((lower - 0.5, 4), abs=1.5 * step)
    assert ends([1e-9]) == (-4, 4)  # its second threshold is beyond the grid
    assert ends([-6.0])[1] == pytest.approx(roots(-6.0)[1] + 0.5, abs=1.5 * step)
    shares = np.stack([(response(abn([beta])) >= 0).mean(0) for beta in (-1.0, 0.01)])
    assert GRID[drawn_part(shares)][0] == pytest.approx(lower - 0.5, abs=1.5 * step)


def test_no_bands_without_a_formula() -> None:
    assert band_shares(InstanceEnhancementBatchNorm2d(3)) is None

    class Tanh(AttentionBatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return torch.tanh(super().forward(input))

    assert band_shares(Tanh(3)) is None  # its thresholds are not those of ABN's formula


def test_the_shift_of_a_norm_that_may_name_it_otherwise_is_not_known() -> None:
    class Tanh(nn.BatchNorm2d):
        def __init__(self, num_features: int) -> None:
            super().__init__(num_features, affine=False)
            self.beta = nn.Parameter(torch.ones(num_features))

    assert math.isnan(learned_norm(Tanh(3).eval()).beta)
    assert learned_norm(abn([0.0, 0.5], shift=True)).beta == 0.25
    assert learned_norm(AttentionBatchNorm2d(3, shift=False).eval()).beta == 0


def test_a_network_without_a_binary_layer_behind_a_norm_is_refused() -> None:
    real = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    with pytest.raises(ValueError, match="has no binary layer behind a norm on feature maps"):
        check_places(real, torch.zeros(1, 3, 8, 8))
    check_places(binarynet(10, 16, nn.BatchNorm2d, width=0.0625).eval(), torch.zeros(1, 3, 16, 16))


def test_how_much_of_the_second_threshold_is_used() -> None:
    betas = [-1.0, 0.1, 0.2, 0.25, 0.27, 0.3]
    # The rule "+1 above the upper threshold" errs below the lower one; "+1 always" errs between the two.
    expected = [min(normal.cdf(roots(beta)[0]), 1 - p_plus(beta)) if 0 < beta < 0.278 else 0.0 for beta in betas]
    np.testing.assert_allclose(beyond_one_threshold(response(abn(betas), WIDE)), expected, atol=1e-3)
    assert expected[3] > 0.02
    # A small beta has its lower threshold far out, where a share is small but not 0.
    far = normal.cdf(roots(0.03)[0])
    assert 1e-8 < far < 1e-6
    assert beyond_one_threshold(response(abn([0.03]), WIDE)) == pytest.approx(far, rel=0.05)
    assert beyond_one_threshold(-WIDE[None]) == pytest.approx(0)


@pytest.mark.slow
def test_end_to_end(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw = Figure.savefig

    def png_alone(figure: Figure, file: BinaryIO, **options: Any) -> None:
        """Draw each figure once; test_cam draws both forms."""
        if options["format"] == "pdf":
            file.write(b"%PDF")
        else:
            draw(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", png_alone)
    assert analyze(monkeypatch, "activations", study) == 0
    out = study / "analysis" / "activations"
    text = (out / "summary.md").read_text()
    assert "channel imbalance" in capsys.readouterr().out
    assert re.search(r"- \*\*(higher|lower|undecided)\*\*: On digits with binarynet, channel imbalance is", text)
    # The thresholds table beside it says the same of each layer.
    row = next(csv.DictReader((out / "comparison.csv").read_text().splitlines()[i] for i in (0, 3)))
    layers = re.findall(r"^\| \S+\.norm \| abn \| \S+(?: \[.*?\])? \| (\S+)", text, re.MULTILINE)
    assert row["measure"] == "share of channels with two thresholds"
    assert float(row["mean"]) == pytest.approx(np.mean([float(share) for share in layers]), abs=6e-4)
    assert float(row["mean"]) > 0
    assert float(row["reference_mean"]) == 0
    assert row["verdict"] == ""  # BN's is 0 by construction, so that nothing is tested
    assert re.search(r"two thresholds is \S+ with abn \(.*\)\. With bn it is 0: each sign", text)
    assert re.search(
        r"- measured on CPU \(.+, 1 thread\), torch 2\..+, commit [0-9a-f]{40}(-dirty)?: 4 networks", text
    )
    assert str(study.parent) not in text
    assert "python scripts/analyze.py activations runs\n" in text
    assert "by at most 0.00 points" in text  # the network that was trained, on the images it was tested on
    for name in ("imbalance", "channels", "values", "responses", "signs", "outcome", "flips"):
        assert f"({name}_digits_binarynet.png)" in text
        assert (out / f"{name}_digits_binarynet.pdf").stat().st_size > 0
    outcome = next(csv.DictReader((out / "outcome.csv").read_text().splitlines()))
    assert (outcome["measure"], outcome["between"], outcome["n"]) == ("channel imbalance", "seeds", "4")
    assert f"- **{outcome['verdict']}**: On digits with binarynet, from seed to seed of one norm (n = 4 net" in text
    assert len((out / "layers.csv").read_text().splitlines()) == 1 + 4 * 13  # 7 binary inputs, 6 norm outputs
    before = files(out)
    monkeypatch.setattr("abn_exp.report.figures.save", lambda *_: None)  # test_cam draws the same twice
    assert analyze(monkeypatch, "activations", study) == 0
    assert files(out) == before


def test_mistakes_are_one_sentence(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("abn_exp.report.figures.save", lambda *_: None)
    (cell,) = (study / "digits" / "binarynet" / "abn").iterdir()
    for name in ("bn", "abn"):  # BN's seed 0 and ABN's seed 1
        shutil.rmtree(study / "digits" / "binarynet" / name / cell.name / f"seed-{int(name == 'bn')}")
    abn = cell / "seed-1"

    def mistake(*arguments: object) -> str:
        capsys.readouterr()
        assert analyze(monkeypatch, "activations", "--images", 20, *arguments) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert mistake(tmp_path / "nothing").startswith("error: There are no runs in ")
    assert mistake(study).endswith("abn and bn have no seed in common.")
    assert (
        mistake(study, "--reference", "abm")
        == "error: --reference abm is not among the norms of these runs: abn, bn."
    )
    assert not list(study.rglob("*.pt"))  # told before anything is measured
    monkeypatch.setattr(activation_report, "get_object_or_explain", lambda *_: nn.InstanceNorm2d)
    assert "AttentionBatchNorm2d, the norm of " in mistake(abn)
    assert mistake(abn).endswith("seed-1, is neither.")
    monkeypatch.undo()
    monkeypatch.setattr("abn_exp.report.figures.save", lambda *_: None)
    assert analyze(monkeypatch, "activations", "--images", 20, abn) == 0  # a norm alone is described
    assert "No comparison on digits with binarynet: there is abn alone." in capsys.readouterr().out
    (abn / "checkpoints" / "last.ckpt").unlink()
    assert "has no checkpoints/last.ckpt to analyse" in mistake(abn)
    (abn / "result.json").unlink()
    assert mistake(abn).endswith("is finished (unfinished); train to the end first.")

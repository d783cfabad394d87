"""The benchmark compares like with like, counts what it says, and writes what it found."""

import csv
import math
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from abn_exp import models
from abn_exp.binarize import Binarization
from abn_exp.config import Config
from abn_exp.machine import cpu_count
from abn_exp.models.build import initialize_
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.training import parallel
from abn_exp.training.parallel import random_data
from benchmarks import measure, report, run
from benchmarks.configurations import BASE, EAGER, PLAIN, ROWS, Effort
from benchmarks.conventional import ConventionalLoop, Norm, conventional
from benchmarks.run import Benchmark
from tests.helpers.scripts import load_script

TINY = Effort(
    batch_size={"resnet18_paper": 4, "binarynet": 4},
    repetitions=1,
    warm=1,
    steps=1,
    all_rows=("binarynet",),
    images=(8, 16),
    widths=(0.25, 0.5),
    batches=(2, 4),
    growth_width=0.25,
    growth_batch=4,
    seeds=2,
)


@pytest.mark.parametrize("model", ["resnet18_paper", "binarynet"])
def test_the_conventional_network_computes_what_ours_does(model: str) -> None:
    zero = Binarization(sign_zero="zero")
    ours = getattr(models, model)(10, 32, AttentionBatchNorm2d, width=0.25, binarization=zero)
    initialize_(ours, 0).double()
    theirs = conventional(initialize_(getattr(models, model)(10, 32, Norm, width=0.25), 0)).double()
    for layer in theirs.modules():
        if isinstance(layer, Norm):
            layer.moving_mean, layer.moving_var = layer.moving_mean.double(), layer.moving_var.double()
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        network(x).square().sum().backward()
    torch.testing.assert_close(theirs(x), ours(x))
    names = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = names[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.view_as(parameter), parameter.grad, msg=name)
    biases = [layer.bias for layer in theirs.modules() if isinstance(layer, nn.Conv2d)]
    assert len(biases) == sum(isinstance(layer, nn.Conv2d) for layer in ours.modules()) > 5
    assert all(bias is not None for bias in biases)


def test_the_conventional_norm_keeps_its_statistics_graph_unless_it_is_cut() -> None:
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    for detach in (False, True):
        norm = Norm(2, detach=detach)
        norm(x)
        norm(x)
        assert (norm.moving_mean.grad_fn is None) == detach
        mean = x.mean((0, 2, 3))
        torch.testing.assert_close(norm.moving_mean.flatten(), 0.99 * mean)


def test_conventional_images_are_cropped_flipped_and_normalised() -> None:
    data = random_data(2, 2)
    loop = ConventionalLoop(nn.Linear(1, 1), data, 2, torch.device("cpu"), 0)
    plain = torch.stack([loop.test_loader.dataset[i][0] for i in range(2)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(plain, (data.test.images / 255 - mean) / std)
    drawn = {tuple(loop.train_loader.dataset[0][0].flatten()[:50].tolist()) for _ in range(20)}
    assert len(drawn) > 5


def test_saved_bytes_count_each_storage_once_and_no_weight() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: (layer(x) * layer(x)).sum(), layer) == 3 * 16 * 8 * 4  # x, both products


def test_exponent_is_the_power() -> None:
    assert measure.exponent([1, 2, 4], [3, 24, 192]) == pytest.approx(3)


def test_host_growth_finds_a_leak() -> None:
    if not math.isfinite(measure.host_growth(lambda: None, 2)):
        pytest.skip("this system does not say how much memory a process has")
    kept = []
    leak = measure.host_growth(lambda: kept.append(bytearray(b"1") * 500_000), 30)
    assert leak == pytest.approx(500_000, rel=0.2)


def test_interleaving_takes_turns() -> None:
    order = []

    def call(name: str) -> float:
        order.append(name)
        return 1.0

    calls = {name: partial(call, name) for name in "ab"}
    assert measure.interleaved(calls, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "a", "b"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement made, but as few times as it can be: what a measurement is worth has tests of its own."""
    ceilings, host_growth = cache(measure.ceilings), measure.host_growth
    monkeypatch.setattr(measure, "ceilings", lambda device, repetitions: ceilings(device, 1))
    monkeypatch.setattr(measure, "host_growth", lambda step, steps: host_growth(step, 1))
    monkeypatch.setattr(run, "configuration", cache(run.configuration))

    def measured(config: Config, norm: str, counts: list[int], device: torch.device) -> dict[int, float]:
        loop, batches = parallel.begin(config, norm)
        return {count: count * parallel.images_per_second(loop.step, batches, 0.01, device) for count in counts}

    monkeypatch.setattr(parallel, "WARM", 0.01)
    monkeypatch.setattr(parallel, "measure", measured)  # in processes that test_parallel starts
    # Each of many looks for garbage would look at all that other tests imported, for a second.
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_small_benchmark_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WIDTHS", {"resnet18_paper": 0.25, "binarynet": 0.0625})
    rows = tuple(row for row in ROWS if not row.compile)
    found = Benchmark(torch.device("cpu"), TINY, 1, rows).run()
    folder = report.write(found, TINY, "CPU (some, 2 threads)", "python scripts/benchmark.py", tmp_path)
    assert folder == tmp_path / "cpu-some-2-threads"
    assert {path.name for path in folder.iterdir()} == {"benchmark.csv", "benchmark.md", "growth.png", "growth.pdf"}
    with open(folder / "benchmark.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    left = {row.name for row in rows} - (set() if found.ours == EAGER else {EAGER})
    assert {line["row"] for line in lines} >= left
    assert all(float(line["median"]) for line in lines if line["column"] != "growth of host memory, kB/step")
    saved = {row: q.median for (place, row, c), q in found.columns.items() if place == "binarynet" and "saved" in c}
    assert saved[BASE] > saved[PLAIN] >= saved[found.ours]
    assert saved[PLAIN] > saved[found.ours] or found.ours == PLAIN
    text = (folder / "benchmark.md").read_text()
    assert "extrapolated from 1 steps" in text
    assert found.ratios["resnet18_paper", BASE].median == 1
    assert ("seeds", found.ours) in found.growth or cpu_count() == 1


def test_where_exact16_is_refused_the_benchmark_goes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("products on cpu are not exact")

    monkeypatch.setattr("abn_exp.training.setup.check_exact16", refuse)
    benchmark = Benchmark(torch.device("cpu"), TINY, 1)
    assert {row.name for row in benchmark.rows} == {row.name for row in ROWS if "exact16" not in row.name}
    assert benchmark.found.ours == PLAIN


@pytest.mark.parametrize("arguments", [["--repetitions", "0"], ["--threads", "x"], ["--device", "tpu"]])
def test_wrong_arguments_are_refused_in_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = load_script("benchmark").parser()
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]

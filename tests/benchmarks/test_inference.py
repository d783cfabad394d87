"""The benchmark of inference: its networks, its ratios, and what it writes."""

import csv
import ctypes
import gc
import math
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import inference

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.parametrize(("norm", "share"), [("abn, 18 %", 0.18), ("abn, all", 1.0)])
def test_channels_have_two_thresholds_in_the_share_that_the_norm_s_name_says(norm: str, share: float) -> None:
    network = inference.make_network("BinaryNet", norm, 0.25)
    shifts = torch.cat([m.bias for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert float((shifts > 0).float().mean()) == pytest.approx(share, abs=0.06)


def test_every_engine_gives_torch_s_logits() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = inference.make_network("BinaryNet", "abn, 18 %", 0.125)(inference.INPUT.normalize(images))
    for name in inference.ENGINES:
        if name == "torch, compiled":
            continue  # compiles for half a minute; tests/training hold compiled networks to the same
        engine = inference.make_engine(name, inference.make_network("BinaryNet", "abn, 18 %", 0.125), 2)
        found: Any = engine.run(images)
        logits = (
            found if isinstance(found, torch.Tensor) else next(iter(found.values() if name == "OpenVINO" else found))
        )
        np.testing.assert_allclose(np.asarray(logits), expected.numpy(), rtol=1e-3, atol=1e-3, err_msg=name)
        assert engine.bytes > 0


class SignalStack(ctypes.Structure):
    _fields_: ClassVar = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def test_signals_are_handled_on_a_stack_that_is_there() -> None:
    """OpenVINO sets one, and takes it away."""
    network = inference.make_network("BinaryNet", "bn", 0.125)
    engines = [inference.make_engine("OpenVINO", network, 2) for _ in range(2)]
    while engines:
        engines.pop(0)
        gc.collect()
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    bounds = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert stack.start is None or any(int(low, 16) <= stack.start < int(high, 16) for low, high in bounds)


def test_a_ratio_is_the_geometric_mean_of_pairs_with_student_s_interval() -> None:
    slow, fast = [2.0, 2.4, 1.8], [1.0, 1.1, 1.2]
    found = inference.Findings({("N", "abn", "e", 1): slow, ("N", "bn", "e", 1): fast}, {}, {})
    mean, low, high, verdict = inference.over_bn(found, "N", "abn", "e", 1)
    logs = np.log(np.divide(slow, fast))
    assert mean == pytest.approx(stats.gmean(np.divide(slow, fast)))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert verdict == "slower"
    assert inference.over_bn(found, "N", "bn", "e", 1)[3] == "no difference seen"


def test_the_table_has_a_line_for_each_norm_and_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "NETWORKS", {"BinaryNet": inference.NETWORKS["BinaryNet"]})
    monkeypatch.setattr(inference, "ENGINES", ("torch", *inference.FOLDED))
    plain, make = inference.make_network("BinaryNet", "bn", 0.125), inference.make_engine
    made = cache(lambda name, batch: make(name, plain, batch))  # each engine once, whatever the norm
    monkeypatch.setattr(inference, "make_engine", lambda name, network, batch: made(name, batch))
    found = inference.measure(2, 0.125, peaks=False)
    folder = inference.write(found, 2, 0.125, "command", tmp_path)
    with open(folder / "inference.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (3 + 3 + 2) * 2  # worst-case shifts only where they can cost time
    assert {row["n"] for row in rows} == {"2"}
    assert {row["width"] for row in rows} == {"0.125"}
    text = (folder / "inference.md").read_text()
    assert "| abn, all: OpenVINO |" in text
    assert "torch, compiled" not in text
    for row in rows:
        if row["norm"] != "bn":
            assert float(row["time_over_bn_low"]) <= float(row["time_over_bn"]) <= float(row["time_over_bn_high"])

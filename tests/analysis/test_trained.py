"""Networks are measured by one process or several, once, and again only where they or their images are others."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from abn_exp.analysis import trained
from abn_exp.analysis.trained import Measured, Opener, find_trained, measure_each
from tests.helpers.runs import trained_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained networks on the digits, ABN's of seeds 0 and 1 and BN's of seed 0."""
    copy = shutil.copytree(trained_study(tmp_path_factory), tmp_path_factory.mktemp("trained") / "runs")
    shutil.rmtree(next(copy.glob("digits/binarynet/bn/*/seed-1")))
    return copy


def logits(network: nn.Module, images: trained.TestImages) -> Measured:
    with torch.no_grad():
        return {"logits": network(images.normalized), "threads": torch.get_num_threads()}


def opener(count: int = 20) -> Opener:
    return Opener(None, count, torch.device("cpu"))


@pytest.mark.parametrize("cpus", [1, 2, 6])
def test_several_processes_find_what_one_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """Each has its share of the CPUs."""
    monkeypatch.setattr(trained, "cpu_count", lambda: cpus)
    runs = find_trained([folder])
    try:
        found = measure_each(runs, opener(), logits, tmp_path, "logits")
    finally:
        torch.set_num_threads(1)
    assert list(found) == [run.directory for run in runs]
    for one in runs:
        expected = logits(opener().network(one), opener().images(one))["logits"]
        torch.testing.assert_close(found[one.directory]["logits"], expected)
        assert found[one.directory]["threads"] == max(1, cpus // 3)


def test_what_was_measured_is_kept_and_only_the_rest_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained, "cpu_count", lambda: 1)
    runs, calls = find_trained([folder]), 0

    def stops_at(number: int) -> trained.Measure:
        def measure(network: nn.Module, images: trained.TestImages) -> Measured:
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return logits(network, images)

        return measure

    with pytest.raises(KeyboardInterrupt):
        measure_each(runs, opener(), stops_at(3), tmp_path, "logits")
    assert "2/3  digits binarynet abn seed 1  ETA 0:00:0" in capsys.readouterr().err
    calls = 0
    found = measure_each(runs, opener(), stops_at(99), tmp_path, "logits")
    assert calls == 1
    assert "2 of 3 networks were measured before" in capsys.readouterr().err
    measure_each(runs, opener(), stops_at(99), tmp_path, "logits")
    assert calls == 1
    for other in (opener(30), opener()):  # other images; something else that is measured
        measure_each(runs[:1], other, stops_at(99), tmp_path, "logits" if other.count == 30 else "others")
    assert calls == 3
    cut = next(iter(tmp_path.glob("*.pt")))
    cut.write_bytes(cut.read_bytes()[:100])
    record = runs[0].directory / "result.json"
    content = record.read_text()
    record.write_text(json.dumps(json.loads(content) | {"train_seconds": 1.25}))  # trained again
    calls = 0
    again = measure_each(runs, opener(), stops_at(99), tmp_path, "logits")
    record.write_text(content)
    assert calls in (1, 2)  # the one that was trained again, and the damaged file where it is one of these
    assert all(torch.equal(again[directory]["logits"], found[directory]["logits"]) for directory in found)


def test_an_error_ends_the_other_processes_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal does: what they are at may take minutes."""
    monkeypatch.setattr(trained, "cpu_count", lambda: 2)
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def measure(network: nn.Module, images: trained.TestImages) -> Measured:
        if barrier.wait(60) == 0:
            raise ValueError("no map")
        time.sleep(600)
        return {}

    start = time.monotonic()
    with pytest.raises(ValueError, match="no map"):
        measure_each(find_trained([folder]), opener(), measure, tmp_path, "logits")
    assert time.monotonic() - start < 60


def _wait_for_ever(connection: Connection) -> None:
    trained._leave_signals()
    connection.send(os.getpid())
    time.sleep(600)


def _be_a_parent(connection: Connection) -> None:
    multiprocessing.get_context("fork").Process(target=_wait_for_ever, args=(connection,)).start()
    time.sleep(600)


def test_a_process_that_measures_ends_with_its_parent() -> None:
    """A parent that is killed cannot end it; a pool's process would wait for the next network for ever."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    parent = fork.Process(target=_be_a_parent, args=(theirs,))
    parent.start()
    assert ours.poll(60)
    stat = Path("/proc", str(ours.recv()), "stat")
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_missing_is_told_before_anything_is_measured(folder: Path) -> None:
    def probe(network: nn.Module, image: torch.Tensor) -> None:
        assert image.shape == (1, 3, 32, 32)
        raise ValueError("no map")

    with pytest.raises(ValueError, match="no map"):
        opener().check(find_trained([folder]), probe)
    elsewhere = Opener(str(folder / "nothing"), 20, torch.device("cpu"))
    elsewhere.check(find_trained([folder]), lambda network, image: None)  # the digits are in scikit-learn

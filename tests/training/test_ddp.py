"""Two processes share a run: as one process would have done it, and recorded once. CPU, gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from abn_exp.data.prepare import load
from abn_exp.identity import RunPlan
from abn_exp.norm import AttentionBatchNorm2d, InstanceEnhancementBatchNorm2d, SynchronizedStatistics
from abn_exp.results import (
    RunResult,
    find_runs,
    load_input_format,
    load_network,
    load_predictions,
    read_metrics,
)
from tests.helpers.runs import REPOSITORY, TINY

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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = (
        "import sys; from tests.training import test_ddp; test_ddp.main(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    arguments = [[sys.executable, "-c", code, str(rank), port, str(out)] for rank in range(2)]
    processes = [subprocess.Popen(one, cwd=REPOSITORY) for one in arguments]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_synchronized_statistics_are_those_of_the_whole_batch(
    ranks: list[dict[str, dict[str, Tensor]]], name: str
) -> None:
    """Against the layer's own float64 step on all six images in one process."""
    x, weights = batch_of(name)
    torch.manual_seed(2)
    expected = step(LAYERS[name]().double(), x.double(), weights.double())
    for key, value in expected.items():
        first, second = (rank[name][key].double() for rank in ranks)
        if key in ("y", "x.grad"):
            found = torch.cat([first, second])
        elif key.endswith(".grad"):
            found = first + second
        else:
            assert torch.equal(first, second)
            found = first
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_outside_it_nothing_is_synchronized() -> None:
    with pytest.raises(ValueError, match="process group"), SynchronizedStatistics():
        nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    with SynchronizedStatistics():  # evaluation shares nothing
        nn.BatchNorm2d(3).eval()(torch.randn(2, 3, 4, 4))


def train(tmp_path: Path, *overrides: str, multirun: bool = False) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "train.py",
        *(["-m"] if multirun else []),
        f"results_dir={tmp_path}",
        "device=cpu",
        *TINY,
        *overrides,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    return subprocess.run(
        [*command, "wandb.mode=offline", f"wandb.dir={tmp_path}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    one = train(tmp_path / "one", "sync_norm=true")
    two = train(tmp_path / "two", "sync_norm=true", "devices=2")
    assert one.returncode == two.returncode == 0, two.stderr
    (single,), (shared,) = find_runs(tmp_path / "one"), find_runs(tmp_path / "two")
    assert single.result is not None
    assert shared.result is not None
    assert shared.result.config_hash == single.result.config_hash
    ours, theirs = read_metrics(single.directory), read_metrics(shared.directory)
    assert [line["epoch"] for line in theirs] == [1, 2]
    for key in ("train/loss", "train/acc", "lr"):
        assert theirs[0][key] == pytest.approx(ours[0][key], rel=1e-4), key
    last = [
        torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
        for run in (single, shared)
    ]
    assert last[0]["global_step"] == last[1]["global_step"] == 12
    # Recorded once: one line an epoch, one table, nothing said twice.
    assert two.stdout.count("epoch 2/2") == 1
    assert len(list((tmp_path / "two" / "wandb").glob("offline-run-*"))) == 1
    assert (shared.directory / "train.log").read_text().count("epoch 2/2") == 1
    assert_predictions(shared.result)
    assert {path.name for path in shared.directory.iterdir()} == {path.name for path in single.directory.iterdir()}
    assert json.loads((shared.directory / "result.json").read_text())["test_acc"] == shared.result.test_acc


def assert_predictions(result: RunResult) -> None:
    """The two processes' shares of a batch are put together in the order of the test set."""
    found, network = load_predictions(result), load_network(result)
    assert found.last_correct.mean() == pytest.approx(result.test_acc, abs=1e-12)
    images = load("digits", ".").test.images
    with torch.no_grad():
        guesses = network(load_input_format(result).normalize(images)).argmax(1).numpy()
    assert (guesses != found.last).mean() < 0.02  # an image may sit on a sign's edge


def test_divergence_is_told_by_one_process(tmp_path: Path) -> None:
    done = train(tmp_path, "devices=2", "recipe.optimizer.name=sgd", "recipe.optimizer.lr=1e38")
    assert done.returncode == 1
    assert done.stderr.count("error: diverged in epoch 1") == 1
    (run,) = find_runs(tmp_path)
    assert run.status == "diverged"


def test_sigterm_ends_all_processes_at_once(tmp_path: Path) -> None:
    overrides = [f"results_dir={tmp_path}", "device=cpu", "devices=2", *TINY, "recipe.epochs=5000"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *overrides], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.02)
    process.terminate()
    # Its error stream is the other process's too: it ends with the last of them.
    assert b"goes on from the last whole epoch" in process.communicate(timeout=60)[1]
    assert process.returncode == 143
    (run,) = find_runs(tmp_path)
    assert run.status == "unfinished"


def test_devices_are_science_only_where_each_normalises_alone(make_plan) -> None:  # type: ignore[no-untyped-def]
    plain: RunPlan = make_plan()
    assert make_plan("devices=2", "sync_norm=true").config_hash == plain.config_hash
    assert make_plan("devices=2", "sync_norm=true").directory == plain.directory
    assert make_plan("sync_norm=true").directory == plain.directory
    alone = make_plan("devices=2")
    assert alone.config_hash != plain.config_hash
    assert "devices-2" in alone.variant


def test_shares_must_be_equal(make_plan) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"recipe\.batch_size=32 must be a multiple of devices=3"):
        make_plan("devices=3")


def test_a_multirun_of_shared_runs_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path, "devices=2", "norm=bn,abn", f"hydra.sweep.dir={tmp_path}", multirun=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: devices=1 is the only choice in a multirun")
    assert not list(tmp_path.rglob("config.yaml"))

"""Two processes share a run: as one process would have done it, and recorded once. CPU, gloo."""

import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from abn_exp.data.prepare import load
from abn_exp.identity import RunPlan
from abn_exp.norm import SynchronizedStatistics
from abn_exp.results import RunResult, find_runs, read_metrics
from abn_exp.trained_network import load_input_format, load_network, load_predictions
from tests.helpers import two_ranks
from tests.helpers.cli import FORKED_RANK, Cli, Done, appears, until
from tests.helpers.runs import TINY
from tests.helpers.two_ranks import LAYERS, batch_of, step


@pytest.fixture(scope="module")
def ranks(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [cli.start(str(rank), port, str(out), program=Path(two_ranks.__file__)) for rank in range(2)]
    for process in processes:
        done = cli.wait(process)
        assert done.code == 0, done.err
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
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, key))


def test_outside_it_nothing_is_synchronized() -> None:
    with pytest.raises(ValueError, match="process group"), SynchronizedStatistics():
        nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    with SynchronizedStatistics():  # evaluation shares nothing
        nn.BatchNorm2d(3).eval()(torch.randn(2, 3, 4, 4))


def train(cli: Cli, tmp_path: Path, *overrides: str, inject: str = "") -> Done:
    """Train; a second process, where there is one, is an interpreter of its own unless `inject` forks it."""
    where = [f"results_dir={tmp_path}", f"wandb.dir={tmp_path}", "wandb.mode=offline"]
    env = {"WANDB_MODE": None, "WANDB_SILENT": "true"}
    return cli.run("device=cpu", *TINY, *where, *overrides, env=env, inject=inject)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(cli: Cli, tmp_path: Path) -> None:
    one = train(cli, tmp_path / "one", "sync_norm=true")
    two = train(cli, tmp_path / "two", "sync_norm=true", "devices=2")
    assert one.code == two.code == 0, two.err
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
    assert two.out.count("epoch 2/2") == 1
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


def is_at_work(pid: str) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_divergence_is_told_by_one_process(cli: Cli, tmp_path: Path) -> None:
    done = train(
        cli, tmp_path, "devices=2", "recipe.optimizer.name=sgd", "recipe.optimizer.lr=1e38", inject=FORKED_RANK
    )
    assert done.code == 1
    assert done.err.count("error: diverged in epoch 1") == 1
    (run,) = find_runs(tmp_path)
    assert run.status == "diverged"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["to one", "to all", "while the other hangs"])
def test_a_signal_ends_all_processes_at_once(cli: Cli, tmp_path: Path, number: signal.Signals, how: str) -> None:
    words = ["device=cpu", *TINY, f"results_dir={tmp_path}", "devices=2", "recipe.epochs=5000"]
    started = cli.start(*words, inject=FORKED_RANK, new_group=True)
    assert until(appears(tmp_path, "last.ckpt"), 120)
    (other,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    if how == "while the other hangs":
        os.kill(int(other), signal.SIGSTOP)
    (os.killpg if how == "to all" else os.kill)(started.pid, number)
    done = cli.wait(started)
    assert "goes on from the last whole epoch" in done.err
    assert done.code == 128 + number
    assert until(lambda: not is_at_work(other))
    (run,) = find_runs(tmp_path)
    assert run.status == "unfinished"


def test_devices_are_science_only_where_each_normalises_alone(make_plan: Callable[..., RunPlan]) -> None:
    plain: RunPlan = make_plan()
    assert make_plan("devices=2", "sync_norm=true").config_hash == plain.config_hash
    assert make_plan("devices=2", "sync_norm=true").directory == plain.directory
    assert make_plan("sync_norm=true").directory == plain.directory
    alone = make_plan("devices=2")
    assert alone.config_hash != plain.config_hash
    assert "devices-2" in alone.variant


def test_shares_must_be_equal(make_plan: Callable[..., RunPlan]) -> None:
    with pytest.raises(ValueError, match=r"recipe\.batch_size=32 must be a multiple of devices=3"):
        make_plan("devices=3")


def test_a_multirun_of_shared_runs_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = train(cli, tmp_path, "-m", "devices=2", "norm=bn,abn", f"hydra.sweep.dir={tmp_path}")
    assert done.code == 1
    assert done.err.startswith("error: devices=1 is the only choice in a multirun")
    assert not list(tmp_path.rglob("config.yaml"))

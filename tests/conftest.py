"""What test files share: a small machine, a configuration as the command line composes it, the command itself."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

for name in [name for name in os.environ if name.startswith("WANDB_")]:  # of whoever runs the tests
    del os.environ[name]
os.environ.update(WANDB_MODE="disabled", WANDB_SILENT="true", DATA_DIR="/nonexistent")
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # torch, imported later, has one; others sleep
os.environ.update(no_proxy="127.0.0.1,localhost", NO_PROXY="127.0.0.1,localhost")
os.fsync = lambda _: None  # type: ignore[assignment]  # of power that fails: a process that is killed loses nothing
gc.disable()  # until everything is imported: all of it stays, and looking through it takes a fifth of that time
# A script's background jobs ignore SIGINT, and so would the processes to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from abn_exp.identity import RunPlan  # noqa: E402  (the environment must be set before)
from tests.helpers.cli import Cli  # noqa: E402
from tests.helpers.runs import plan_in  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU, except from `pytest -m gpu`: many tests compare with what a CPU computes."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # triton's bindings print what is not collected at the end


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Give torch one thread again after a test that took more: two workers on two cores would wait for each other."""
    yield
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., RunPlan]:
    """Return a function from overrides to a plan whose results go to the test's own folder."""
    return partial(plan_in, tmp_path / "results")


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Return what runs `python train.py`."""
    made = Cli(tmp_path_factory.mktemp("cli"))
    yield made
    made.close()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of a report's time, where a test is about its text."""
    monkeypatch.setattr("abn_exp.report.build.draw", lambda report: {})
    monkeypatch.setattr("abn_exp.report.build.html_page", lambda report: "")

"""A run of a few seconds, its plan, and where the repository is."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from abn_exp.config import Config, _check_folders, read
from abn_exp.identity import RunPlan, init_by_run, plan_of

REPOSITORY = Path(__file__).parents[2]

WEIGHTS: tuple[Literal["last", "best"], ...] = ("last", "best")

# A run of a few seconds: 200 of the embedded images, a network of 8 channels.
TINY = ["dataset.train_images=200", "model.width=0.0625", "recipe.epochs=2", "recipe.batch_size=32"]


@cache
def _hydra() -> Hydra:
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return hydra


@contextmanager
def composing() -> Iterator[None]:
    """Let `compose` read conf/, with what this process has found out about it before."""
    hydra = _hydra()  # which puts another instance in the place of the one that is there
    instance = GlobalHydra.instance()
    before, instance.hydra = instance.hydra, hydra
    try:
        yield
    finally:
        instance.hydra = before


def plan_in(folder: Path, *overrides: str, tiny: bool = True) -> RunPlan:
    """Compose a configuration as the command line would; its results go to `folder`."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith(("WANDB_", "DATA_DIR")))
    with composing():
        config, choices, by_run = _read((*(TINY if tiny else []), *overrides), tuple(environment))
        if not any(word.startswith("results_dir=") for word in overrides):
            config = config.model_copy(update={"results_dir": str(folder)})
        _check_folders(config)  # which may have changed
        return plan_of(config.model_copy(deep=True), dict(choices), by_run)


@cache
def _read(words: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> tuple[Config, dict[str, str], bool]:
    """Compose and check a configuration; `environment` is what its interpolations read."""
    cfg = compose("config", list(words), return_hydra_config=True)
    return read(cfg), dict(cfg.hydra.runtime.choices), init_by_run(cfg)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` has filled, for all processes of a test run; a test that changes it copies it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    with FileLock(f"{folder}.lock"):
        made = folder.with_name(f"{folder.name}-made")
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def trained_study(factory: pytest.TempPathFactory) -> Path:
    """Return a study's folder of trained networks, BN and ABN on the digits with seeds 0 and 1, to be read only."""

    def make(folder: Path) -> None:
        from abn_exp.training.run import run  # Lightning, which not every test needs

        for norm in ("bn", "abn"):
            for seed in (0, 1):
                run(plan_in(folder, f"norm={norm}", f"seed={seed}"), "python train.py")

    return once(factory, "trained-study", make) / "runs"

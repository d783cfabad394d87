"""Configurations that are compared, and how many repetitions of each are measured."""

from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir

from abn_exp.config import Config, read

CONF = Path(__file__).parents[1] / "conf"
BASE = "conventional"


@dataclass(frozen=True)
class Row:
    """One way to train. `options` of ours are overrides of the configuration."""

    name: str
    ours: bool
    compile: bool = False
    autocast: bool = False
    options: tuple[str, ...] = ()


ROWS = (
    Row(BASE, False),
    Row("conventional, compiled", False, compile=True),
    Row("conventional, bf16, channels-last", False, autocast=True),
    Row("ours, fp32", True, options=("precision=fp32",)),
    Row("ours, exact16", True, options=("precision=exact16",)),
    Row("ours, exact16, compiled", True, compile=True, options=("precision=exact16", "compile=true")),
    Row("ours, bf16", True, autocast=True, options=("precision=bf16",)),
)
PLAIN = "ours, fp32"
EAGER = "ours, exact16"
HEADLINES = ("ours, exact16, compiled", PLAIN)  # what saves both time and memory; what is left where it is refused
WIDTHS = {"resnet18_paper": 5.0, "binarynet": 3.0}  # the paper's


@dataclass(frozen=True)
class Effort:
    """How much is measured of what, so that it fits a device and a time."""

    batch_size: dict[str, int]
    repetitions: int
    warm: int  # steps before the timed ones
    steps: int
    # Networks of which every row is measured; of others, the conventional loop and exact16's, or fp32's.
    all_rows: tuple[str, ...]
    images: tuple[int, ...]
    widths: tuple[float, ...]
    batches: tuple[int, ...]
    growth_width: float  # of the network whose images and batches grow
    growth_batch: int
    seeds: int  # at most so many are trained at once; 0: not measured


QUICK = Effort(
    batch_size={"resnet18_paper": 48, "binarynet": 12},
    repetitions=3,
    warm=2,
    steps=2,
    all_rows=("resnet18_paper",),
    images=(250, 500, 1000),
    widths=(1.0, 2.0, 3.0, 5.0),
    batches=(8, 16, 32, 64),
    growth_width=0.5,
    growth_batch=16,
    seeds=0,
)
CPU = replace(QUICK, repetitions=9, all_rows=tuple(WIDTHS), seeds=8)
GPU = Effort(
    batch_size={"resnet18_paper": 256, "binarynet": 256},
    repetitions=7,
    warm=5,
    steps=20,
    all_rows=tuple(WIDTHS),
    images=(5_000, 15_000, 50_000),
    widths=(1.0, 2.0, 3.0, 5.0),
    batches=(128, 256, 512, 1024),
    growth_width=5.0,
    growth_batch=256,
    seeds=8,
)
QUICK_GPU = replace(
    GPU,
    repetitions=3,
    steps=10,
    all_rows=("resnet18_paper",),
    images=(5_000, 10_000),
    widths=(1.0, 5.0),
    batches=(256, 1024),
    seeds=0,
)


def configuration(model: str, width: float, batch_size: int, overrides: tuple[str, ...]) -> Config:
    """Return what `train.py` would run, with all images for training."""
    words = [f"model={model}", f"model.width={width}", "norm=abn", "dataset=cifar10", "wandb=disabled"]
    words += [f"recipe.batch_size={batch_size}", "recipe.val_fraction=0", *overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return read(compose("config", words))

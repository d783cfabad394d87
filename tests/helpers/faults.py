"""What the tests of faults share: small runs, and in what two of them differ."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from abn_exp.results import read_metrics, read_result
from abn_exp.trained_network import read_checkpoint
from tests.helpers.runs import REPOSITORY

FULL = os.environ.get("FAULTS") == "full"
RESULTS = REPOSITORY / "results" / "faults"

# A run of a quarter of a second: 40 training images, a network of 8 channels.
SMALL = [
    "dataset.train_images=40",
    "model.width=0.0625",
    "recipe.epochs=2",
    "recipe.batch_size=8",
    "recipe.val_fraction=0.3",
]

TIMES = {"train_seconds", "images_per_second", "seconds", "wandb_run_id"}

Account = Callable[[str, str, int, list[str]], None]


def on_images(images: Path, folder: Path) -> list[str]:
    """Return the command's words for a run on them, with its data and its results below one folder."""
    words = ["dataset=folder", f"dataset.path={images}", "dataset.image_size=8", f"dataset.root={folder / 'data'}"]
    words += ["dataset.padding=1", "model.width=0.0625", "recipe.epochs=2", "recipe.batch_size=8"]
    return [*words, "recipe.val_fraction=0.3", f"results_dir={folder / 'results'}"]


def differences(one: Path, other: Path) -> list[str]:
    """Say in what two runs' directories differ, times aside."""
    found = []
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.name not in (".lock", "previous-last.ckpt", "wandb-run-id")
        }
        for folder in (one, other)
    ]
    if names[0] != names[1]:
        found.append(f"files: {sorted(names[0] ^ names[1])}")
    results = [asdict(result) if (result := read_result(folder)) is not None else {} for folder in (one, other)]
    metrics = [read_metrics(folder) for folder in (one, other)]
    for records in (results, *zip(*metrics, strict=False)):
        for key in sorted(records[0].keys() | records[1].keys()):
            if key not in (*TIMES, "directory") and records[0].get(key) != records[1].get(key):
                found.append(f"{key}: {records[0].get(key)}, {records[1].get(key)}")
    if len(metrics[0]) != len(metrics[1]):
        found.append(f"{len(metrics[0])} and {len(metrics[1])} epochs")
    for name in ("last.ckpt", "best.ckpt"):
        states = [read_checkpoint(folder / "checkpoints" / name)["state_dict"] for folder in (one, other)]
        unequal = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
        found += [f"{name}: {key}" for key in unequal]
    return found

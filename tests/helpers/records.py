"""Records of runs that were never trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from abn_exp.results import RunResult, write_result


def start_run(
    folder: Path,
    norm: str,
    seed: int,
    dataset: str = "digits",
    model: str = "binarynet",
    variant: str = "fixed",
    epochs: int = 4,
    config: str = "a: 1\n",
) -> Path:
    directory = folder / dataset / model / norm / variant / f"seed-{seed}"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config)
    curve = 0.9 - 0.5 / np.arange(1, epochs + 1) + 0.001 * seed
    lines = [json.dumps({"epoch": e, "val/acc": acc, "lr": 0.1}) + "\n" for e, acc in enumerate(curve, 1)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def result_in(directory: Path, seed: int, test_acc: float, **others: Any) -> RunResult:
    """Return the record of a run in its directory; `others` replace what is made up here."""
    dataset, model, norm, variant, _ = directory.parts[-5:]
    result = RunResult(
        dataset=dataset,
        model=model,
        norm=norm,
        recipe="fixed",
        variant=variant,
        seed=seed,
        config_hash="0a1b2c",
        epochs=4,
        train_seconds=12.5,
        images_per_second=800.0,
        val_acc_last=0.8,
        val_acc_best=0.82,
        best_epoch=2,
        test_acc=test_acc,
        test_acc_top5=0.99,
        test_loss=0.5,
        test_acc_best_val=test_acc + 0.001,
        test_acc_peak=None,
        parameters={"total": 1000, "binary": 900, "bytes_packed": 512},
        versions={"torch": "2.15.0"},
        git_commit="abcdef0",
        device="cpu",
        wandb_run_id=None,
    )
    return replace(result, **others)


def finish_run(
    folder: Path,
    norm: str,
    seed: int,
    test_acc: float,
    peak: float | None = None,
    device: str = "cpu",
    versions: dict[str, str] | None = None,
    **where: Any,
) -> Path:
    directory = start_run(folder, norm, seed, **where)
    others: dict[str, Any] = {"test_acc_peak": peak, "device": device, "versions": versions or {"torch": "2.15.0"}}
    write_result(directory, result_in(directory, seed, test_acc, **others))
    return directory


def study(folder: Path, cells: Mapping[str, Sequence[float | None]], **where: Any) -> Path:
    """Write finished runs, seeds 0, 1, ...; None in a list leaves that seed out."""
    for norm, accuracies in cells.items():
        for seed, accuracy in enumerate(accuracies):
            if accuracy is not None:
                finish_run(folder, norm, seed, accuracy, **where)
    return folder


# A configuration, of which two options are to be filled in.
RECORDED = """\
dataset: {{name: cifar10, train_images: null}}
model: {{_target_: some.model, width: 1}}
norm: {{_target_: some.norm}}
recipe: {{epochs: {epochs}, optimizer: {{lr: {lr}}}}}
precision: fp32
"""

BN = [0.700, 0.710, 0.705, 0.715, 0.720]


CLEARLY_ABOVE = [0.708, 0.720, 0.716, 0.722, 0.731]  # differences 0.8, 1.0, 1.1, 0.7, 1.1 points


def section(markdown: str, title: str) -> str:
    return markdown.split(f"\n## {title}")[1].split("\n## ")[0]


def table_rows(text: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]

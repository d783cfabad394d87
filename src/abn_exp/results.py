"""The record of runs: write it, read it, find it.

A run's directory is ``<results_dir>/<name>/<dataset>/<model>/<norm>/<variant>/seed-<k>/`` and holds

    config.yaml         the resolved configuration
    metrics.jsonl       one line an epoch
    checkpoints/        last.ckpt, best.ckpt
    train.log           what was printed
    result.json         at the end of a finished run, or
    FAILED              why the run ended without a result, in words
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from abn_exp.config import build_network

SCHEMA = 1

Status = Literal["finished", "failed", "diverged", "unfinished"]


@dataclass(frozen=True)
class RunResult:
    """What one finished run found. Accuracies are fractions in [0, 1]; times are seconds.

    ``test_acc`` is the headline: the official test set, read once, with the last epoch's weights.
    ``test_acc_best_val`` uses the weights of the best validation epoch (None without a validation split).
    ``test_acc_peak`` is the maximum over test evaluations after every epoch: peeking, recorded only where
    the recipe asks for the published protocol (``recipe.test_every_epoch``).
    """

    dataset: str
    model: str
    norm: str
    recipe: str
    variant: str
    seed: int
    config_hash: str
    epochs: int
    train_seconds: float
    images_per_second: float
    val_acc_last: float | None
    val_acc_best: float | None
    best_epoch: int | None
    test_acc: float
    test_acc_top5: float
    test_loss: float
    test_acc_best_val: float | None
    test_acc_peak: float | None
    parameters: dict[str, int]  # total, binary, bytes_real, bytes_packed, binary_macs, real_macs
    versions: dict[str, str]
    git_commit: str | None
    device: str
    wandb_run_id: str | None
    schema: int = field(default=SCHEMA)

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What was run, without the seed: (dataset, model, norm, variant)."""
        return self.dataset, self.model, self.norm, self.variant


@dataclass(frozen=True)
class Run:
    """One run's directory as it was found, whether or not the run came to its end."""

    directory: Path
    dataset: str
    model: str
    norm: str
    variant: str
    seed: int
    status: Status
    reason: str | None = None  # why, where status is failed or diverged
    result: RunResult | None = None  # where status is finished

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return self.dataset, self.model, self.norm, self.variant


def variant_name(recipe: str, changes: dict[str, Any]) -> str:
    """Return the folder name of a recipe with overrides: ``fixed_epochs-3_model.width-1``.

    ``changes`` maps dotted keys to the values in which a configuration differs from its groups' own. A name
    that had to lose something (a character, its end) carries a digest of all changes, so that no two are equal.
    """
    parts = [recipe]
    for key, value in sorted(changes.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key.removeprefix('recipe.')}-{text}")
    full = "_".join(parts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", full)[:100]
    if name != full:
        name = f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"
    return name


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, at any moment, finds the old file or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_result(directory: Path, result: RunResult) -> None:
    write_text_atomic(directory / "result.json", json.dumps(asdict(result), indent=2) + "\n")


def read_result(directory: Path) -> RunResult | None:
    """Return the directory's result, or None where the run has not come to its end.

    Raises ValueError, naming the file, where the record is not one this version can read.
    """
    path = directory / "result.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable record ({error}). Delete it and run the run again.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a record of schema {SCHEMA}, the one this version reads.")
    known = {f.name for f in fields(RunResult)}
    if missing := known - record.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. Delete it and run the run again.")
    return RunResult(**{key: record[key] for key in known})


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in order of epoch; a last line cut short by a kill is left out."""
    try:
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    metrics = []
    for number, line in enumerate(lines):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{directory / 'metrics.jsonl'} line {number + 1}: {error}") from error
    return metrics


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run."""
    return yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))


def find_runs(folder: Path) -> list[Run]:
    """Return every run below ``folder``, in whatever state it is, sorted by cell and seed."""
    found = []
    for directory in sorted(Path(folder).rglob("seed-*")):
        if not (directory / "config.yaml").is_file():
            continue
        dataset, model, norm, variant, seed = directory.parts[-5:]
        result = read_result(directory)
        failed = directory / "FAILED"
        reason = failed.read_text(encoding="utf-8").strip() if failed.is_file() else None
        status: Status = "unfinished"
        if result is not None:
            status = "finished"
        elif reason is not None:
            status = "diverged" if reason.startswith("diverged") else "failed"
        number = int(seed.removeprefix("seed-"))
        found.append(Run(directory, dataset, model, norm, variant, number, status, reason, result))
    return sorted(found, key=lambda run: (run.cell, run.seed))


def load_runs(folder: str | Path) -> list[RunResult]:
    """Return the results of all finished runs below ``folder``, sorted by cell and seed."""
    return [run.result for run in find_runs(Path(folder)) if run.result is not None]


def load_network(directory: str | Path, weights: Literal["last", "best"] = "last") -> torch.nn.Module:
    """Return the network of a run with its trained weights, in evaluation mode on the CPU.

    ``weights`` are those of the last epoch or of the best validation epoch. Raises FileNotFoundError where the run
    has saved none, ConfigError where its configuration no longer describes a network.
    """
    path = Path(directory) / "checkpoints" / f"{weights}.ckpt"
    config = read_config(Path(directory))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    network = build_network(
        config["model"], config["norm"], checkpoint["num_classes"], config["dataset"]["image_size"]
    )
    prefix = "network."
    network.load_state_dict({key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()})
    return network.eval()

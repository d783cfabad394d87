"""Records of runs: write, read and find them.

A run's directory is ``<results_dir>/<name>/<dataset>/<model>/<norm>/<variant>/seed-<k>/`` and holds

    config.yaml         the resolved configuration
    input.json          what the network takes: pixels a side, mean and std, the names of its classes
    metrics.jsonl       one line an epoch; the first is epoch 1
    checkpoints/        last.ckpt, best.ckpt
    train.log           what was printed
    RUNNING             while a process trains it: which; found later, it was killed
    predictions.npz     what the network predicts for each test image
    result.json         at the end of a finished run, with
    SHA256SUMS          of its other files (`sha256sum --check SHA256SUMS`), or
    FAILED              why the run ended without a result, in words
    wandb-run-id        where the run was logged to W&B
    network.ckpt        of a run restored from an archive: the network that it ended with
    .replaced/          what `force` replaces, until an epoch has been trained

A quoted study keeps the same files, but for the checkpoints, in one archive (`records`), and where that was asked for
the trained networks in another. All functions here that take a run's directory find them there, too.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import TypeAdapter, ValidationError

from abn_exp.errors import DamagedFile
from abn_exp.files import write_text_atomic
from abn_exp.records import NETWORK, RUN_FILES, archived_runs, read_run_file
from abn_exp.trained_network import directory_of, read_config

# Part of what is used from Python, beside RunResult and load_runs below
from abn_exp.trained_network import load_input_format as load_input_format
from abn_exp.trained_network import load_network as load_network
from abn_exp.trained_network import load_predictions as load_predictions

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

SCHEMA = 2  # 1: epochs counted from 0 in metrics.jsonl
REPLACED = ".replaced"
# What moves when a run is set aside: all but its log, which is open, and its configuration last.
MOVED = (*(n for n in RUN_FILES if n not in ("train.log", "config.yaml")), NETWORK, "checkpoints", "config.yaml")
CHECKED = ("config.yaml", "input.json", "metrics.jsonl", "predictions.npz", "result.json")  # files in SHA256SUMS

Status = Literal["finished", "failed", "diverged", "unfinished", "damaged"]


@dataclass(frozen=True)
class RunResult:
    """The results of one finished run. Accuracies are fractions in [0, 1]; times are seconds.

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
    threads: int | None = None
    code: str | None = None  # digest of the source files that can change a number (`provenance.code_digest`)
    # Of a run that was continued with other code, libraries or hardware: the fields from versions to code, of its
    # earlier parts.
    earlier: list[dict[str, Any]] = field(default_factory=list)
    directory: Path | None = field(default=None, compare=False)  # where it was read from; not in result.json

    @property
    def device_kind(self) -> str:
        """ "cpu", or the GPU's name: between kinds, results of one configuration are not averaged."""
        return "cpu" if self.device.lower().startswith("cpu") else self.device

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What was run, without the seed: (dataset, model, norm, variant)."""
        return self.dataset, self.model, self.norm, self.variant


_RECORD = TypeAdapter(RunResult)


@dataclass(frozen=True)
class Run:
    """One run as it was found, in a directory of its own or in its study's archive, finished or not."""

    directory: Path
    dataset: str
    model: str
    norm: str
    variant: str
    seed: int
    status: Status
    reason: str | None = None  # why, where status is failed, diverged or damaged
    result: RunResult | None = None  # where status is finished

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return self.dataset, self.model, self.norm, self.variant


def write_result(directory: Path, result: RunResult) -> None:
    """Write the record, after the checksums of the run's other files: with it, the run is finished."""
    record = {key: value for key, value in asdict(result).items() if key != "directory"}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    found = [path for name in CHECKED if name != "result.json" and (path := directory / name).is_file()]
    contents = {path.name: path.read_bytes() for path in found}
    contents["result.json"] = text.encode()
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    write_text_atomic(directory / "SHA256SUMS", sums)
    write_text_atomic(directory / "result.json", text)


def read_result(directory: Path) -> RunResult | None:
    """Return the directory's result, or None where the run has not come to its end.

    Raises DamagedFile where a file of the run is not what was written, ValueError for a record of another version.
    """
    path = directory / "result.json"
    content = read_run_file(directory, path.name)
    if content is None:
        return None
    _verify(directory)
    try:
        record = json.loads(content, parse_constant=_no_number)
        if not isinstance(record, dict):
            raise ValueError("it is not a record")
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, error) from error
    if record.get("schema") not in range(1, SCHEMA + 1):
        raise ValueError(f"{path} is not a record of schema 1 to {SCHEMA}, those that this version reads.")
    needed = {f.name for f in fields(RunResult) if f.default is MISSING and f.default_factory is MISSING}
    if missing := needed - record.keys():
        raise DamagedFile(path, f"it lacks {', '.join(sorted(missing))}")
    if "threads" not in record and (threads := re.search(r", (\d+) threads?\)", str(record["device"]))):
        record["threads"] = int(threads[1])
    record = {key: value for key, value in record.items() if key != "directory"} | {"schema": SCHEMA}
    try:
        result = _RECORD.validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedFile(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return replace(result, directory=directory)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number that is written")


def _verify(directory: Path) -> None:
    """Raise DamagedFile for the first file whose checksum is not the one in SHA256SUMS."""
    sums = directory / "SHA256SUMS"
    content = read_run_file(directory, sums.name)
    if content is None:  # an older record has none
        return
    try:
        lines = [line.split("  ", 1) for line in content.decode().splitlines()]
        expected = {name: digest for digest, name in lines}
    except ValueError as error:
        raise DamagedFile(sums, error) from error
    for name, digest in expected.items():
        path = directory / name
        if name not in CHECKED:
            raise DamagedFile(sums, f"it names {name!r}")
        content = read_run_file(directory, name)
        if content is None:
            raise DamagedFile(path, "it is gone")
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedFile(path, "its SHA-256 is not the one in SHA256SUMS")
    if "result.json" not in expected:
        raise DamagedFile(sums, "it does not list result.json")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in order of epoch, the first of which is 1; a last line cut short by a
    kill is left out.

    Raises DamagedFile where another line cannot be read.
    """
    path = directory / "metrics.jsonl"
    lines = (read_run_file(directory, path.name) or b"").splitlines()
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        try:
            metrics.append({"epoch": number + 1} | json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(lines) - 1:
                break
            raise DamagedFile(path, f"line {number + 1}, {error}") from error
    return count_from_one(metrics)


def count_from_one(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of metrics with their epochs counted from 1, as older versions counted from 0."""
    older = bool(metrics) and metrics[0].get("epoch") == 0
    return [{**line, "epoch": line["epoch"] + 1} if older else line for line in metrics]


def has_begun(directory: Path) -> bool:
    """Return whether a run was ever started: a sweep writes the configurations of all its runs beforehand."""
    if not directory.is_dir():
        return any(read_run_file(directory, name) is not None for name in ("result.json", "FAILED", "metrics.jsonl"))
    return any(path.name not in ("config.yaml", ".lock") for path in directory.iterdir())


def remove_run(directory: Path) -> None:
    """Remove a run, and the folders above it that then are empty. Hold its lock."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        for folder in list(directory.parents)[:5]:
            folder.rmdir()


def set_aside(directory: Path) -> None:
    """Move a run's files, but for its log, into a folder within its own, until something new is trained in its place.

    The configuration moves last, and comes back first: a folder without it is that of an interrupted move.
    """
    (directory / "RUNNING").unlink(missing_ok=True)
    (directory / REPLACED).mkdir(exist_ok=True)
    for name in MOVED:
        if (directory / name).exists():
            os.replace(directory / name, directory / REPLACED / name)


def is_set_aside(directory: Path) -> bool:
    """Tell whether a run was set aside, and no epoch has been trained in its place."""
    metrics = directory / "metrics.jsonl"
    whole = (directory / REPLACED / "config.yaml").is_file()
    return (directory / REPLACED).is_dir() and not (whole and metrics.is_file() and metrics.stat().st_size > 0)


def restore_replaced(directory: Path) -> bool:
    """Put back what `set_aside` moved where no epoch was trained since, else remove it; tell whether it was put back.

    Hold the run's lock. Killed at any moment, it can be called again.
    """
    aside = directory / REPLACED
    if back := is_set_aside(directory):
        if (aside / "config.yaml").is_file():
            for name in MOVED:
                _remove(directory / name)
            os.replace(aside / "config.yaml", directory / "config.yaml")
        for path in list(aside.iterdir()):
            os.replace(path, directory / path.name)
    elif aside.is_dir():
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.yaml"):  # it is the last to go
            _remove(path)
    with suppress(FileNotFoundError):
        aside.rmdir()
    return back


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def find_runs(folder: Path) -> list[Run]:
    """Return every run below ``folder``, in whatever state it is, sorted by cell and seed.

    Raises DamagedFile where the archive of a study cannot be read.
    """
    folder = Path(folder)
    own = {path.parent for path in folder.rglob("seed-*/config.yaml") if path.parent.name[5:].isdecimal()}
    return sorted(map(find_run, own.union(archived_runs(folder))), key=lambda run: (run.cell, run.seed))


def find_run(directory: Path) -> Run:
    """Return the run of a directory, in whatever state it is."""
    dataset, model, norm, variant, seed = directory.absolute().parts[-5:]
    status, reason, result = _state(directory)
    return Run(directory, dataset, model, norm, variant, int(seed.removeprefix("seed-")), status, reason, result)


def _state(directory: Path) -> tuple[Status, str | None, RunResult | None]:
    """Return a run's status, the reason for it, and its result. What cannot be read is a status, not an error."""
    try:
        result = read_result(directory)
        read_config(directory)
        failed = read_run_file(directory, "FAILED")
        reason = failed.decode(errors="replace").strip() if failed is not None else None
    except (ValueError, OSError) as error:
        return "damaged", str(error), None
    if result is not None:
        return "finished", reason, result
    if reason is not None:
        return "diverged" if reason.startswith("diverged") else "failed", reason, None
    return "unfinished", None, None


@overload
def load_runs(folder: str | Path, *, frame: Literal[False] = False) -> list[RunResult]: ...


@overload
def load_runs(folder: str | Path, *, frame: Literal[True]) -> "pandas.DataFrame": ...


def load_runs(folder: str | Path, *, frame: bool = False) -> "list[RunResult] | pandas.DataFrame":
    """Return the results of all finished runs below ``folder``, sorted by cell and seed; warn of damaged ones.

    With ``frame`` they are a pandas DataFrame: a row a run, a column a field of RunResult (``parameters.binary`` and
    ``versions.torch`` of those that hold several), and one for each option in which the runs differ, by its key.
    Raises ImportError where there is no pandas.
    """
    runs = find_runs(Path(folder))
    for run in runs:
        if run.status == "damaged":
            log.warning("left out: %s", run.reason)
    results = [run.result for run in runs if run.result is not None]
    return _frame(results) if frame else results


def _frame(results: Sequence[RunResult]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError as error:
        raise ImportError('load_runs(frame=True) needs pandas: pip install "abn_exp[notebook]".') from error
    from abn_exp.options import all_options

    options = [all_options(read_config(directory_of(result))) for result in results]
    keys = sorted({key for one in options for key in one})
    varying = [key for key in keys if any(one.get(key) != options[0].get(key) for one in options)]
    rows = [asdict(r) | {key: one.get(key) for key in varying} for r, one in zip(results, options, strict=True)]
    return pandas.json_normalize(rows)

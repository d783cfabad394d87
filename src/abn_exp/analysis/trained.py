"""Trained networks and the images they are tested on: find them, open them, measure each."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from abn_exp.config import DatasetConfig, parse
from abn_exp.data.prepare import ImageDataset, load
from abn_exp.data.splits import first_of_each_class
from abn_exp.files import writing
from abn_exp.machine import available_memory, cpu_count, end_with_parent
from abn_exp.models.build import channels_last_
from abn_exp.provenance import device_kind, device_name, git_commit
from abn_exp.report.progress import clock
from abn_exp.results import Run, find_runs
from abn_exp.trained_network import load_input_format, load_trained_network, read_config, weights_file
from abn_exp.training.setup import trained_input_format

Measured = dict[str, Any]  # text, numbers, tensors, and lists and dictionaries of these
MEASURED_ON = "measured on"  # its key for where that was
MEMORY = 2**30  # bytes that one process is assumed to need


def find_trained(folders: Iterable[str | Path]) -> list[Run]:
    """Return the finished runs in `folders`; each is a run's own folder (seed-0) or any folder above some.

    Raises ValueError where a folder has none, or where a finished run's weights are gone.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        whole = folder.resolve()
        below = find_runs(whole.parent) if whole.name.startswith("seed-") else find_runs(whole)
        runs = [run for run in below if run.directory.is_relative_to(whole)]
        finished = [run for run in runs if run.status == "finished"]
        if not runs:
            raise ValueError(f"There are no runs in {folder}; give a run's folder (.../seed-0) or one above it.")
        if not finished:
            states = ", ".join(sorted({run.status for run in runs}))
            raise ValueError(f"No run in {folder} is finished ({states}); train to the end first.")
        found |= {run.directory: run for run in finished}
    for directory in found:
        if not weights_file(directory).is_file():
            if not directory.is_dir():
                raise ValueError(f"{directory} is in an archive; restore it, with its network, as the README says.")
            raise ValueError(f"{directory} has no checkpoints/last.ckpt to analyse; train it again with force=true.")
    return sorted(found.values(), key=lambda run: (run.cell, run.seed))


def common_folder(folders: Sequence[str | Path]) -> Path:
    """Return the folder that all of these are in; of a single one, that one."""
    return Path(os.path.commonpath([Path(folder).resolve() for folder in folders]))


@dataclass(frozen=True)
class TestImages:
    """A test set, or a share of it: images as they are and as a network takes them, (N, 3, S, S)."""

    data: ImageDataset
    indices: Tensor  # (N,), of the whole test set
    normalized: Tensor
    labels: Tensor

    @property
    def boxes(self) -> Tensor | None:
        """(N, 4): x0, y0, x1, y1 in pixels, both corners inside; None where the set has none."""
        return None if self.data.test_boxes is None else self.data.test_boxes[self.indices]


def source_at(dataset: DatasetConfig, root: str | None) -> dict[str, Any]:
    """Return what `load` takes, of a set whose data, or whose folder of images, are in `root` now; None: where they
    were. What is made of a folder goes where a run of today would have it."""
    if root is None:
        return dataset.source
    if dataset.name == "folder":
        return dataset.source | {"path": root, "root": os.environ.get("DATA_DIR", "./data")}
    return dataset.source | {"root": root}


class Opener:
    """Opens runs: the network with its last weights, and the images it is tested on, read once a data set."""

    def __init__(self, root: str | None, count: int | None, device: torch.device) -> None:
        """`root`: where their data are now (`source_at`); `count` is how many test images, None: all."""
        self.root, self.count, self.device = root, count, device
        self.measured_on: Counter[str] = Counter()  # by device, version and commit: how many networks
        self._key, self._images = "", None  # type: tuple[str, TestImages | None]

    def images(self, run: Run) -> TestImages:
        """Return the same images for every run on one data set: the first of each class, in equal shares."""
        if (key := self.key(run)) != self._key or self._images is None:
            config = parse(read_config(run.directory))
            data = load(**source_at(config.dataset, self.root))
            chosen = first_of_each_class(data.test.labels, self.count)
            normalized = trained_input_format(run.directory, data).normalize(data.test.images[chosen])
            self._key = key
            self._images = TestImages(data, chosen, normalized.to(self.device), data.test.labels[chosen])
        return self._images

    def key(self, run: Run) -> str:
        """Return a key that runs share if they are tested on the same images, normalised in the same way."""
        config = parse(read_config(run.directory))
        options = config.dataset.model_dump(exclude={"padding", "flip", "train_images"})
        with suppress(ValueError):
            options |= asdict(load_input_format(run)) | {"images": None}  # `digest` is of those that are there now
        return f"{options} {config.recipe.normalization} {self.root} {self.count}"

    def digest(self, run: Run) -> str:
        """Return a digest of these images: those of a folder may change while its path does not."""
        images = self.images(run)
        return hashlib.sha256(images.data.test.images[images.indices].numpy().tobytes()).hexdigest()

    def network(self, run: Run) -> nn.Module:
        return network_on(run.directory, "last", self.device)

    def check(self, runs: Iterable[Run], probe: Callable[[nn.Module, Tensor], object]) -> None:
        """Open every network and data set, and let `probe` see each network with one image.

        Raises ValueError or OSError for what is missing, before anything is measured.
        """
        for run in runs:
            probe(self.network(run), self.images(run).normalized[:1])


Measure = Callable[[nn.Module, TestImages], Measured]
_job: tuple[Opener, Measure, int]  # of the processes that measure, which are forks of this one


def measure_each(
    runs: Sequence[Run], opener: Opener, measure: Measure, folder: Path, what: str
) -> dict[Path, Measured]:
    """Return `measure` of each run's network, by the run's directory.

    Each is kept in `folder`, under a name that depends on the run's record, the images and `what` is measured: an
    analysis that was stopped, or that has more runs, goes on. On a CPU several processes measure one run each, since
    threads gain little in networks as small as most here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {run.directory: opener.key(run) for run in runs}
    ordered = sorted(runs, key=lambda run: keys[run.directory])
    images = {key: opener.digest(next(group)) for key, group in groupby(ordered, lambda run: keys[run.directory])}
    what += f" {device_kind(opener.device)}"
    digests = {run.directory: _digest(run, key := keys[run.directory], images[key], what) for run in runs}
    paths = {directory: folder / f"{digest}.pt" for directory, digest in digests.items()}
    found = {directory: kept for directory, path in paths.items() if (kept := _read(path)) is not None}
    if found:
        print(f"{len(found)} of {len(runs)} networks were measured before", file=sys.stderr, flush=True)
    todo, begun, done = [run for run in runs if run.directory not in found], time.monotonic(), 0
    for _, group in groupby(todo, opener.key):
        for run in _measure_all([(run, paths[run.directory]) for run in group], opener, measure):
            done += 1
            left = (time.monotonic() - begun) / done * (len(todo) - done)
            name = " ".join([*run.cell[:3], f"seed {run.seed}"])
            print(
                f"{len(runs) - len(todo) + done}/{len(runs)}  {name}  ETA {clock(left)}", file=sys.stderr, flush=True
            )
    found |= {run.directory: torch.load(paths[run.directory], weights_only=True) for run in todo}
    opener.measured_on = Counter(one.pop(MEASURED_ON) for one in found.values())
    return found


def _measure_all(jobs: Sequence[tuple[Run, Path]], opener: Opener, measure: Measure) -> Iterator[Run]:
    """Measure runs that are tested on the same images; yield each when it is done."""
    global _job
    opener.images(jobs[0][0])  # which the forks share
    cpus = cpu_count()
    count = int(min(len(jobs), cpus, max(1, available_memory() // MEMORY)))
    _job = opener, measure, cpus // count
    if cpus == 1 or opener.device.type != "cpu" or sys.platform != "linux":
        for job in jobs:
            yield _measure(*job)
        return
    # A fork of a process whose threads have computed would deadlock, so this process only forks.
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_leave_signals) as pool:
        try:
            for done in as_completed([pool.submit(_measure, *job) for job in jobs]):
                yield done.result()
        except BaseException:  # a signal, say: what they are at may take minutes
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    """Leave signals to the parent of this fork, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _measure(run: Run, path: Path) -> Run:
    opener, measure, threads = _job
    torch.set_num_threads(threads)
    measured = measure(opener.network(run), opener.images(run))
    where = f"{device_name(opener.device, threads)}, torch {torch.__version__}, commit {git_commit()}"
    with writing(path) as file:
        torch.save(measured | {MEASURED_ON: where}, file)
    return run


def _digest(run: Run, *what: str) -> str:
    record = (run.directory / "result.json").read_bytes()  # it has the training times, so it identifies the run
    return hashlib.sha256(b"\0".join([record, *(text.encode() for text in what)])).hexdigest()[:16]


def _read(path: Path) -> Measured | None:
    try:
        measured = torch.load(path, weights_only=True)
    except Exception:  # not there, or damaged: it is measured again
        return None
    return measured if isinstance(measured, dict) and MEASURED_ON in measured else None


def network_on(directory: Path, weights: Literal["last", "best"], device: torch.device) -> nn.Module:
    """Return a run's network on a device, in the memory format of training; errors as in `load_trained_network`.

    It computes in float32, also on a GPU, whose convolutions would have TF32 otherwise.
    """
    torch.backends.cudnn.allow_tf32 = False
    return channels_last_(load_trained_network(directory, weights).to(device))

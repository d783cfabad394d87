"""Three hundred runs in one process: nothing grows, nothing leaks from one into another, the end is as the start."""

import csv
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made while it is imported

from abn_exp.report import figures
from abn_exp.results import find_runs, read_metrics
from tests.helpers.cli import NO_FIGURES, Cli
from tests.helpers.faults import FULL, RESULTS, SMALL, Account, differences

SEEDS, NORMS = (50, ["bn", "abn", "bn_noscale"]) if FULL else (2, ["bn", "abn"])
COUNT = 2 * SEEDS * len(NORMS)
# What the last quarter's median may be above that of the quarter after the first tenth, which fills caches.
ALLOWED = {
    "memory_mb": 20.0 if FULL else 40.0,
    "wandb_memory_mb": 10.0 if FULL else 20.0,
    "tensors": 5.0,
    "file_handles": 1.0,
    "threads": 1.0,
}

WORDS = {
    "memory_mb": "memory of the process (MB)",
    "wandb_memory_mb": "memory of W&B's process (MB)",
    "tensors": "tensors and modules",
    "file_handles": "open file handles",
    "threads": "threads",
}

SAMPLE = """
import gc, json, os, torch
import abn_exp.training.run as e
samples, real = open({path!r}, "w"), e.run
kinds = (torch.Tensor, torch.nn.Module)
def rss(pid):
    with open(f"/proc/{{pid}}/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024
def children():
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{{name}}/stat") as file:
                if name.isdecimal() and file.read().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                    found.append(name)
        except OSError:
            pass
    return found
def run(*rest):
    result = real(*rest)
    memory = [rss("self"), sum(map(rss, children()))]
    gc.collect()
    counts = [sum(issubclass(type(o), kinds) for o in gc.get_objects())]
    counts += [len(os.listdir(f"/proc/self/{{what}}")) for what in ("fd", "task")]
    samples.write(json.dumps(memory + counts) + "\\n")
    samples.flush()
    return result
e.run = run
"""


@pytest.mark.slow
def test_soak(cli: Cli, tmp_path: Path, account: Account) -> None:
    """Each run has a twin half the sweep later, in another folder: the last is that of the first half's last."""
    path, folders = tmp_path / "samples", [tmp_path / "first", tmp_path / "again"]
    words = ["-m", f"results_dir={','.join(map(str, folders))}", f"seed=range(0,{SEEDS})", f"norm={','.join(NORMS)}"]
    words += [*SMALL, f"wandb.dir={tmp_path}", "hydra/launcher=basic"]
    done = cli.run(
        *words,
        inject=SAMPLE.format(path=str(path)) + ("" if FULL else NO_FIGURES),
        env={"WANDB_MODE": "offline", "HOME": str(tmp_path)},
        cwd=tmp_path,
        timeout=3600,
    )
    assert done.code == 0, done.out[-3000:] + done.err
    names = list(ALLOWED)
    samples = np.array([json.loads(line) for line in path.read_text().splitlines()])
    assert samples.shape == (COUNT, len(names))
    assert samples[0, 0] > 100  # a process that has torch in it; a sample that always said 0 would not grow either
    assert (samples[0, 2:] > [-1, 3, 0]).all()
    if FULL:
        record(samples)

    runs = [find_runs(folder) for folder in folders]
    lost = [f"{run.directory}: {run.status}" for run in itertools.chain(*runs) if run.status != "finished"]
    for one, other in zip(*runs, strict=True):
        lost += [f"{other.directory}: {line}" for line in differences(one.directory, other.directory)]
    account("soak", "a run and its repetition half the process later: bit for bit", COUNT // 2, lost)

    lost = leaks(tmp_path / "wandb", [run.directory for run in itertools.chain(*runs)])
    account("soak", "W&B: each run's history is its own, whole, and nobody else's", COUNT, lost)

    quarter, warm = COUNT // 4, COUNT // 10
    for i, name in enumerate(names):
        early, late = np.median(samples[warm : warm + quarter, i]), np.median(samples[-quarter:, i])
        lost = [f"{name}: {early:.0f} at first, {late:.0f} at last"] if late > early + ALLOWED[name] else []
        account("soak", f"{WORDS[name]} over the runs of one process: no growth", COUNT, lost)


def leaks(folder: Path, directories: list[Path]) -> list[str]:
    """Say where what W&B was told differs from the runs' own records."""
    histories: dict[str, list[dict[str, Any]]] = {}
    lost = []
    for file in folder.glob("offline-run-*/*.wandb"):
        found, lines = [], []
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                found.append(record.run)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if {run.run_id for run in found} != {file.stem.removeprefix("run-")}:
            lost.append(f"{file}: {[run.run_id for run in found]}")
        if found[0].job_type == "train":
            histories[found[0].run_id] = lines
    ids = [(directory / "wandb-run-id").read_text() for directory in directories]
    if len(set(ids)) != len(directories) or histories.keys() != set(ids):
        lost.append(f"{len(directories)} runs, {len(set(ids))} ids, {len(histories)} histories")
    for directory, run_id in zip(directories, ids, strict=True):
        ours = read_metrics(directory)
        theirs = [line for line in histories.get(run_id, []) if "train/loss" in line]  # not the network's table
        same = len(ours) == len(theirs) and all(
            line[key] == their.get(key) for line, their in zip(ours, theirs, strict=True) for key in line
        )
        if not same:
            lost.append(f"{directory}: {len(ours)} epochs on disk, {[line.get('epoch') for line in theirs]} at W&B")
    return lost


def records(file: Path) -> Iterator[Record]:
    """Read a .wandb file: a header of 7 bytes, then LevelDB's log, blocks of 32 KiB with records or parts of them."""
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield Record.FromString(whole)
            whole = b""


def record(samples: np.ndarray) -> None:
    """Write the figures that the account stands on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    header = ["runs", *ALLOWED]
    rows = [[i, *(f"{value:.1f}" for value in row[:2]), *map(int, row[2:])] for i, row in enumerate(samples, 1)]
    with open(RESULTS / "soak.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = list(figure.subplots(2, 3).flat)
        axes.pop().remove()
        for i, (ax, name) in enumerate(zip(axes, ALLOWED, strict=True)):
            ax.plot(np.arange(1, len(samples) + 1), samples[:, i], color="black", linewidth=1)
            title = WORDS[name][0].upper() + WORDS[name][1:]
            ax.set(title=title, ylim=(0, 1.2 * samples[:, i].max() or 1), xlabel="Runs done" if i > 1 else "")
        figure.suptitle(f"{len(samples)} runs in one process", fontsize=8.5)
        figure.savefig(RESULTS / "soak.png", metadata={"Software": None})

"""The bench of faults: commands that cost little, and the account of what was tried, survived and lost.

In its short form it is part of the tests; `make faults` (FAULTS=full) tries more of everything and writes
results/faults/report.md and report.csv.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn_exp import provenance
from abn_exp.results import read_checkpoint, read_metrics, read_result
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


@dataclass
class Done:
    """A command that has ended: its exit status, -9 for SIGKILL and so on, and what it printed."""

    code: int
    out: str
    err: str
    trace: list[str]


@dataclass
class Started:
    pid: int
    out: Path
    err: Path
    trace: Path


class Cli:
    """`python train.py`, in forks of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def start(
        self,
        *arguments: str,
        env: dict[str, str | None] | None = None,
        inject: str = "",
        watch: Path | None = None,
        kill_at: int | str | None = None,
        cwd: Path = REPOSITORY,
    ) -> Started:
        """Start a command. `inject` is run before it; `kill_at` kills it at that change of a file below `watch`:
        its number, or a part of its path."""
        self.count += 1
        out, err, trace = (self.folder / f"{self.count}.{kind}" for kind in ("out", "err", "trace"))
        out.touch()  # it may be killed before it has opened them
        err.touch()
        job = {"arguments": arguments, "env": env or {}, "inject": inject, "cwd": str(cwd), "out": str(out)}
        job |= {"err": str(err), "trace": str(trace), "kill_at": kill_at, "watch": str(watch) if watch else None}
        return Started(self._ask(start=job), out, err, trace)

    def wait(self, started: Started, timeout: float = 120) -> Done:
        code = self._ask(wait=started.pid, timeout=timeout)
        if code is None:
            os.kill(started.pid, signal.SIGKILL)
            self._ask(wait=started.pid, timeout=10)
            raise TimeoutError(f"not done in {timeout} s: {started.out.read_text()} {started.err.read_text()}")
        trace = started.trace.read_text().splitlines() if started.trace.exists() else []
        return Done(code, started.out.read_text(), started.err.read_text(), trace)

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> Done:
        return self.wait(self.start(*arguments, **options), timeout)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 40 + 12 images of two classes, 8 pixels a side."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("ant", "bee")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def on_images(images: Path, folder: Path) -> list[str]:
    """Return the command's words for a run on them, with its data and its results below one folder."""
    words = ["dataset=folder", f"dataset.path={images}", "dataset.image_size=8", f"dataset.root={folder / 'data'}"]
    words += ["dataset.padding=1", "model.width=0.0625", "recipe.epochs=2", "recipe.batch_size=8"]
    return [*words, "recipe.val_fraction=0.3", f"results_dir={folder / 'results'}"]


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    made = Cli(tmp_path_factory.mktemp("cli"))
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait()
    made.process.stdout.close()


Account = Callable[[str, str, int, list[str]], None]


@pytest.fixture
def account() -> Account:
    """Return a function of (part, fault, how many were tried, a line for each that was lost): write, then assert."""

    def write(part: str, fault: str, tried: int, lost: list[str]) -> None:
        if FULL:
            RESULTS.mkdir(parents=True, exist_ok=True)
            with open(RESULTS / "account.jsonl", "a") as file:
                file.write(json.dumps([part, fault, tried, min(len(lost), tried)]) + "\n")
        assert tried > 0
        assert not lost, "\n".join(lost)

    return write


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


TIMES = {"train_seconds", "images_per_second", "seconds", "wandb_run_id"}


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


ACCOUNTS = RESULTS / "account.jsonl"
PARTS = ["kill", "disk", "damage", "two at once", "numbers", "W&B", "bad input", "hostile", "soak"]
HEAD = """# The bench of faults

What this project was subjected to and what became of it: each row is a kind of fault, how often it was tried, and how
often the run, its record and the words about it were as they should be (survived) or not (lost).
Written by `make faults` at commit {commit} on {device}, with {versions}.

"""


def pytest_sessionstart(session: pytest.Session) -> None:
    if FULL and not hasattr(session.config, "workerinput"):
        ACCOUNTS.unlink(missing_ok=True)  # of a bench that was stopped


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn the accounts of all processes into the report."""
    if not FULL or hasattr(session.config, "workerinput") or not ACCOUNTS.is_file():
        return
    total: dict[tuple[str, str], list[int]] = {}
    for line in ACCOUNTS.read_text().splitlines():
        part, fault, tried, lost = json.loads(line)
        entry = total.setdefault((part, fault), [0, 0])
        entry[0] += tried
        entry[1] += lost
    ACCOUNTS.unlink()
    rows = [[*key, tried, tried - lost, lost] for key, (tried, lost) in total.items()]
    rows.sort(key=lambda row: (PARTS.index(row[0]), row[1]))
    header = ["part", "fault", "tried", "survived", "lost"]
    with open(RESULTS / "report.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    first = {row[0]: row for row in reversed(rows)}  # a part is named in its first row only
    shown = [[row[0] if row is first[row[0]] else "", *row[1:]] for row in rows]
    shown.append(["**all**", "", *(f"**{sum(row[i] for row in rows)}**" for i in (2, 3, 4))])
    lines = [f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * 2 + ["--:"] * 3, *shown]]
    head = HEAD.format(
        commit=provenance.git_commit(),
        device=provenance.device_name(torch.device("cpu"), 1),
        versions=", ".join(f"{name} {version}" for name, version in provenance.versions().items()),
    )
    if session.testsfailed:
        lines += [
            "",
            f"{session.testsfailed} tests failed; a fault whose test broke off before its end is not listed.",
        ]
    (RESULTS / "report.md").write_text(head + "\n".join(lines) + "\n")

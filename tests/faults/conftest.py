"""The bench of faults: the account of what was tried, survived and lost.

In its short form it is part of the tests; `make faults` (FAULTS=full) tries more of everything and writes
results/faults/report.md and report.csv.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn_exp import provenance
from tests.helpers.faults import FULL, RESULTS, Account


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
    rows: list[list[Any]] = [[*key, tried, tried - lost, lost] for key, (tried, lost) in total.items()]
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

"""Every recipe of CONTRIBUTING.md, applied to a copy of the project, does what it says."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.runs import REPOSITORY

pytestmark = pytest.mark.slow  # all of them, so that one worker has them: what they look at is made once a worker

# One interpreter runs all commands, each as if it was typed: what is imported is imported once. A study goes first,
# for its workers are forks, and no process can be forked in which a network was trained. Figures are not drawn.
DRIVER = """
import multiprocessing, os, runpy, sys
import abn_exp.report.figures as figures, abn_exp.training.run, abn_exp.training.workers as workers
workers._spawn = multiprocessing.get_context("fork")
figures.save = lambda *_: None
for line in sys.stdin.read().splitlines():
    program, *arguments = line.split("\\t")
    sys.argv = [program, *arguments]
    print("RUN", *sys.argv, flush=True)
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            print(code)
    print("CODE", 0 if code in (0, None) else 1, flush=True)
"""


def recipes() -> dict[str, str]:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^    (python .*)$", text, re.MULTILINE)]


def apply(text: str, copy: Path) -> None:
    """Write the files and apply the diffs of a recipe; a diff's lines are found by what they say."""
    for name, content in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert not (copy / name).exists(), f"{name} is there already"
        (copy / name).write_text(content, encoding="utf-8")
    for diff in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"(?m)^(?=--- a/)", diff)[1:]:
            file = copy / part.split("\n", 1)[0].removeprefix("--- a/")
            for hunk in re.split(r"(?m)^@@.*\n", part)[1:]:
                lines = hunk.splitlines()
                before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
                after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
                content = file.read_text(encoding="utf-8")
                assert content.count(before) == 1, f"{file.name} should hold once:\n{before}"
                file.write_text(content.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Return the copy with all recipes in it, and each recipe's exit codes and output."""
    copy = tmp_path_factory.mktemp("contributing") / "abn_exp"
    copy.mkdir()
    for name in ("train.py", "conf", "src", "scripts", "benchmarks"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    shutil.copytree(REPOSITORY / "results/quoted/budget", copy / "results/quoted/budget")
    found = recipes()
    for text in found.values():
        apply(text, copy)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"{split}_images": rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        for split, n in (("train", 80), ("test", 40))
    }
    arrays |= {f"{split}_labels": np.arange(n) % 2 for split, n in (("train", 80), ("test", 40))}
    np.savez(copy / "shapes-original.npz", classes=np.array(["circle", "square"]), **arrays)
    first = sorted(found, key=lambda name: "study=" not in found[name])
    lines = ["\t".join(command) for name in first for command in commands(found[name])]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "DATA_DIR": str(copy)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=copy,
        env=environment,
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"^RUN (.*?)\n(.*?)^CODE (\S+)$", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(ran) == len(lines)
    return copy, {name: (code, out + done.stderr) for name, (_, out, code) in zip(first, ran, strict=True)}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_runs(outcome: tuple[Path, dict[str, tuple[str, str]]], name: str) -> None:
    assert len(commands(recipes()[name])) == 1
    code, output = outcome[1][name]
    assert code == "0", output


def test_recipes_leave_what_they_promise(outcome: tuple[Path, dict[str, tuple[str, str]]]) -> None:
    copy, _ = outcome
    folders = {path.relative_to(copy / "results").parts[:4] for path in copy.glob("results/**/result.json")}
    assert {("runs", "digits", "binarynet", "tanh"), ("runs", "digits", "two_layers", "abn")} <= folders
    assert ("runs", "shapes", "binarynet", "abn") in folders
    assert (copy / "shapes.npz").is_file()  # converted by the recipe's own reader
    spec = importlib.util.spec_from_file_location("my_norm", copy / "my_norm.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    norm, x = made.TanhBatchNorm2d(4), torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(norm.beta, 0.5)
    xhat = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), torch.tanh(xhat) + 0.5)  # as its docstring says
    variants = {path.parent.parent.name for path in copy.glob("results/runs/digits/binarynet/abn/*/*/result.json")}
    assert any("activation_estimator-tanh" in variant for variant in variants)
    assert any("input_noise-0.1" in variant for variant in variants)
    assert "| test loss |" in (copy / "table/report.md").read_text(encoding="utf-8")
    report = (copy / "results/shift/report.md").read_text(encoding="utf-8")
    assert "Primary comparison: abn_noshift against abn" in report

"""The command line: what it costs to start, before and where nothing is trained."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.runs import REPOSITORY

SLOW_TO_IMPORT = {"torch", "pytorch_lightning", "wandb", "matplotlib", "scipy", "sklearn", "numpy"}


def test_nothing_slow_is_imported_before_the_command_is_known_to_be_right() -> None:
    """`--help`, completion and a misspelt option wait for `train`; a wrong value and a sweep's check for the rest."""
    code = f"""
import sys
import train
import abn_exp.config, abn_exp.identity, abn_exp.results, abn_exp.training.sweep
print(sorted({SLOW_TO_IMPORT!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "words", [["train.py", "--help"], ["-m", "abn_exp.config"], ["scripts/runs.py", "results/quoted/variance"]]
)
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == ""
    assert done.returncode == -signal.SIGPIPE

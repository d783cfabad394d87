"""Run a script in this process, as if it was typed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.runs import REPOSITORY


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return load_script(name).main()


def analyze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Analyse trained networks in this process alone: what is forked after several threads computed may deadlock."""
    monkeypatch.setattr("abn_exp.analysis.trained.cpu_count", lambda: 1)
    return run_script(monkeypatch, "analyze", *arguments)


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

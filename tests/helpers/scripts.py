"""Run a script in this process, as if it was typed."""

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.helpers.runs import REPOSITORY


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("analyze", REPOSITORY / "scripts" / "analyze.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def analyze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
    return load_script().main()

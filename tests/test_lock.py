"""requirements.lock: what training needs, each at one version within its range and with hashes, and no addresses."""

import re
import tomllib
from itertools import pairwise

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.runs import REPOSITORY

TEXT = (REPOSITORY / "requirements.lock").read_text()
PINS = [Requirement(block.split("\\")[0].strip()) for block in re.split(r"\n(?=\S)", TEXT.strip())]


def test_every_dependency_is_pinned_within_its_range() -> None:
    """After a change of pyproject.toml: `make lock`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert pins, f"{wanted.name} is not locked: run `make lock`"
        for pin in pins:
            (version,) = pin.specifier
            assert version.operator == "=="
            assert wanted.specifier.contains(version.version), f"{pin} is not {wanted}: run `make lock`"


def test_every_pin_has_hashes_and_nothing_names_a_host() -> None:
    lines = TEXT.splitlines()
    assert len(PINS) > 50
    for line, after in pairwise(lines):
        assert line.startswith("    ") or after.startswith("    --hash=sha256:"), line
    assert not re.search(r"://|--index-url|--find-links|--extra-index", TEXT)

"""What others read of the package: its citation, and that it is typed."""

import tomllib
from importlib.resources import files

import yaml

from tests.helpers.runs import REPOSITORY


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (paper,) = citation["references"]
    assert paper["doi"] == "10.3390/e27060645"
    assert f"doi {paper['doi']}" in (REPOSITORY / "README.md").read_text()


def test_type_checkers_read_its_annotations() -> None:
    assert files("abn_exp").joinpath("py.typed").is_file()

"""Imports point one way, and the committed results stay few files."""

import subprocess

import pytest

from tests.helpers.imports import imports_of, levels, loaded_by, module_graph, unit_graph
from tests.helpers.runs import REPOSITORY

PACKAGE = REPOSITORY / "src/abn_exp"
# Each may import what stands before it, and nothing behind it.
ORDER = (
    *("errors", "files", "seeding", "provenance", "machine", "binarize", "norm", "exact16", "data", "models"),
    *("optimizer", "config", "options", "commandline", "records", "trained_network", "results"),
    *("warm_start", "identity"),
    *("report", "training", "analysis", "deploy"),
)
OUTSIDE = ("benchmarks", "scripts", "tests")  # beside src
LIGHT = ("abn_exp.binarize", "abn_exp.norm", "abn_exp.exact16", "abn_exp.models.", "abn_exp.report.stats")


def test_each_part_of_the_package_imports_only_what_stands_before_it() -> None:
    graph = {name.removeprefix("abn_exp."): imported for name, imported in unit_graph(module_graph(PACKAGE)).items()}
    graph.pop("abn_exp")
    assert graph.keys() == set(ORDER)
    for name, imported in graph.items():
        behind = {other.removeprefix("abn_exp.") for other in imported} - set(ORDER[: ORDER.index(name)])
        assert not behind, f"{name} imports {behind}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert levels(module_graph(PACKAGE)) > 1  # raises CycleError where they do
    assert levels(module_graph(REPOSITORY / "benchmarks")) > 1


def test_the_package_imports_nothing_of_benchmarks_scripts_or_tests() -> None:
    for path in (REPOSITORY / "src").rglob("*.py"):
        outside = {name for name in imports_of(path, REPOSITORY / "src") if name.split(".")[0] in OUTSIDE}
        assert not outside, f"{path} imports {outside}"


def test_layers_networks_and_statistics_need_neither_hydra_nor_lightning() -> None:
    for name in module_graph(PACKAGE):
        if f"{name}.".startswith(LIGHT) and name != "abn_exp.models.build":
            path = REPOSITORY / "src" / (name.replace(".", "/") + ".py")
            path = path if path.is_file() else path.with_suffix("") / "__init__.py"
            heads = {imported.split(".")[0] for imported in imports_of(path, REPOSITORY / "src")}
            assert not heads & {"hydra", "omegaconf", "pytorch_lightning", "lightning_fabric"}, name


def test_an_analysis_imports_nothing_that_trains() -> None:
    """Lightning is half of what it would import, and more than a small analysis computes."""
    source = REPOSITORY / "src"
    assert "torch" not in loaded_by(REPOSITORY / "scripts/analyze.py", REPOSITORY / "scripts") | loaded_by(
        PACKAGE / "commandline.py", source
    )
    for name in ("activation_report", "cam_report"):
        loaded = loaded_by(PACKAGE / f"analysis/{name}.py", source)
        assert {"torch", "abn_exp.analysis.summary"} <= loaded
        assert "pytorch_lightning" not in loaded
    assert "pytorch_lightning" in loaded_by(PACKAGE / "training/run.py", source)


def test_the_committed_results_are_fewer_than_150_files() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "results"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout of git")
    assert len(listed.stdout.splitlines()) < 150

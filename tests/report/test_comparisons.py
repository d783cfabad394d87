"""Cells hold runs of one kind of device, and the report says where machines differ."""

from pathlib import Path

import pytest
import yaml

from abn_exp.report.build import build_report, write_report
from abn_exp.report.comparisons import collect_cells
from abn_exp.results import find_runs
from abn_exp.trained_network import InputFormat, write_input_format
from tests.helpers.records import finish_run, start_run, study

CPU, GPU = "CPU (AMD EPYC, 1 thread)", "NVIDIA H200"
SCORES = {"bn": [0.70, 0.71, 0.72], "abn": [0.71, 0.73, 0.74]}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three seeds of each norm on a CPU; on a GPU three more, ten points better, abn and bn the other way round."""
    for norm, scores in SCORES.items():
        other = SCORES["abn" if norm == "bn" else "bn"]
        for seed, score in enumerate(scores):
            finish_run(tmp_path, norm, seed, score, device=CPU)
            finish_run(tmp_path, norm, seed + 3, other[seed] + 0.1, device=GPU)
    return tmp_path


def test_a_cell_of_several_kinds_of_device_is_split(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(mixed, "abn", 6)  # on what is not known: it counts to one of them
    cells = collect_cells(find_runs(mixed))
    assert [(cell.norm, cell.device, [*cell.scores["test_acc"]]) for cell in cells] == [
        ("bn", GPU, [3, 4, 5]),
        ("abn", GPU, [3, 4, 5]),
        ("bn", "cpu", [0, 1, 2]),
        ("abn", "cpu", [0, 1, 2]),
    ]
    assert sum(6 in cell.unscored for cell in cells) == 1
    monkeypatch.setattr("abn_exp.report.build.draw", lambda report: {})
    monkeypatch.setattr("abn_exp.report.build.html_page", lambda report: "")
    report = write_report(mixed)
    differences = {c.cell.device: round(c.mean.mean.difference, 2) for c in report.comparisons}
    assert differences == {"cpu": 1.67, GPU: -1.67}  # pooled, it would be 0
    (factor,) = report.factors
    assert (factor.name, factor.levels) == ("device", ("cpu", GPU))
    text = (mixed / "report.md").read_text()
    assert f"Trained on several kinds of device ({GPU}, cpu), whose arithmetic is not the same" in text
    assert f"On digits with binarynet (device {GPU}), abn" in text


def test_no_average_is_over_several_kinds_of_device(tmp_path: Path) -> None:
    """One network on a CPU, the other on a GPU: there is no effect over both, primary or not."""
    question = {"norm": "abn", "reference": "bn", "datasets": None, "models": None, "statistic": "pooled"}
    primary = {"primary": question, "delta": 0.5}
    for model, device in (("binarynet", CPU), ("vgg_small", GPU)):
        study(tmp_path, SCORES, model=model, device=device, config=yaml.safe_dump(primary))
    report = build_report(tmp_path)
    assert len(report.comparisons) == 2  # each cell's own
    assert report.pooled == []
    assert report.primary is not None
    assert report.primary.pooled is None
    assert (
        "It was run on several kinds of device, which are not averaged: there are the cells' own"
        in report.answer()[0]
    )


def test_averages_over_other_factors_are_within_a_kind_of_device(tmp_path: Path) -> None:
    for variant, rate in (("fixed", 0.1), ("fixed_lr-0.2", 0.2)):
        for first, device in ((0, CPU), (3, GPU)):
            for norm, scores in SCORES.items():
                config = yaml.safe_dump({"recipe": {"lr": rate}})
                for seed, score in enumerate(scores, first):
                    finish_run(tmp_path, norm, seed, score + rate, device=device, variant=variant, config=config)
    tables = {table.title: table for table in build_report(tmp_path).effects}
    assert all("over" not in effect.what for effect in tables["Effect of lr, against 0.1"].effects)
    assert len(tables["Effect of lr, against 0.1"].effects) == 4  # two norms, two kinds
    assert len({effect.what for effect in tables["Effect of lr, against 0.1"].effects}) == 4
    assert tables["How the difference to bn changes with lr"].averages == []


def test_norms_on_different_kinds_of_device_are_not_compared(tmp_path: Path) -> None:
    study(tmp_path, {"bn": SCORES["bn"]}, device=CPU)
    study(tmp_path, {"abn": SCORES["abn"]}, device=GPU)
    report = build_report(tmp_path)
    assert report.comparisons == []
    assert {cell.device for cell in report.cells} == {"cpu", GPU}
    assert len({report.describe_group(cell.group) for cell in report.cells}) == 2


def test_norms_of_a_seed_on_cpus_of_different_capability_are_named(tmp_path: Path) -> None:
    for norm, scores in SCORES.items():
        for seed, score in enumerate(scores):
            capability = "AVX2" if norm == "abn" and seed == 1 else "AVX512"
            finish_run(tmp_path, norm, seed, score, device=CPU, versions={"cpu capability": capability})
    report = build_report(tmp_path)
    assert len(report.comparisons) == 1
    assert report.differing == [
        "Runs that are compared were not all made alike. digits with binarynet (fixed): cpu capability: AVX512 "
        "(bn 3, abn 2), AVX2 (abn 1)."
    ]


def test_code_of_one_s_own_and_images_that_changed_between_seeds_are_named(tmp_path: Path) -> None:
    for norm, scores in SCORES.items():
        for seed, score in enumerate(scores):
            own = {"my_norm.py": "0123456789ab"} if norm == "abn" else {}
            directory = finish_run(tmp_path, norm, seed, score, versions={"torch": "2.15.0", **own})
            write_input_format(directory, InputFormat(32, (0.5,) * 3, (0.2,) * 3, ("a", "b"), "of then"))
    assert build_report(tmp_path).differing == []  # BN has no such file
    changed = finish_run(tmp_path, "abn", 3, 0.7, versions={"torch": "2.15.0", "my_norm.py": "ba9876543210"})
    write_input_format(changed, InputFormat(32, (0.5,) * 3, (0.2,) * 3, ("a", "b"), "of now"))
    assert build_report(tmp_path).differing == [
        "Runs that are compared were not all made alike. digits with binarynet (fixed): images: of then (bn 3, "
        "abn 3), of now (abn 1); my_norm.py: 0123456789ab (abn 3), ba9876543210 (abn 1)."
    ]

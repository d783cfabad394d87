import csv
import io
import re
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from abn_exp.report.build import build_report, print_report, write_report
from abn_exp.report.comparisons import Comparison, collect_cells, compare_cells
from abn_exp.report.figures import NORM_STYLES, norm_styles
from abn_exp.report.spread import pairs_needed
from abn_exp.report.tables import Report
from abn_exp.results import find_runs
from tests.helpers.records import BN, CLEARLY_ABOVE, RECORDED, finish_run, section, start_run, study, table_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return study(tmp_path / "claims", {"bn": BN, "abn": CLEARLY_ABOVE})


def only(report: Report) -> Comparison:
    (comparison,) = report.comparisons
    return comparison


def test_cells_hold_scores_by_seed_and_reasons(folder: Path) -> None:
    directory = start_run(folder, "abn", 5)
    (directory / "FAILED").write_text("diverged: the loss is nan in epoch 4")
    start_run(folder, "abn", 6)
    bn, abn = collect_cells(find_runs(folder))
    assert (bn.norm, abn.norm, abn.group) == ("bn", "abn", ("digits", "binarynet", "fixed"))
    assert bn.scores["test_acc"] == dict(enumerate(BN))
    assert abn.unscored == {
        5: "diverged: the loss is nan in epoch 4 (4 epochs recorded)",
        6: "unfinished (4 epochs recorded)",
    }
    assert abn.failed == {5}
    np.testing.assert_allclose(abn.sample("test_acc", [0, 5]), [70.8, np.nan])


def judged(folder: Path, **options: Any) -> tuple[str, str]:
    """Return the verdict on the only difference of means, and its sentence."""
    report = build_report(folder, **options)
    c = only(report)
    return c.mean.verdict, report.mean_sentence(c.cell, c.mean, report.reference)


def test_a_clear_difference_is_better_in_the_numbers_of_scipy(folder: Path) -> None:
    verdict, sentence = judged(folder)
    assert verdict == "better"
    # mean 0.94 points, std 0.1817: 0.94 +- 2.7764 * 0.1817 / sqrt(5), t = 11.57, p = 0.000318
    assert sentence == (
        "On digits with binarynet, abn - bn is +0.94 points (95 % interval 0.71 to 1.17, n = 5 paired seeds): "
        "better, by the two-sided test of no difference (p < 0.001)."
    )


def test_the_same_numbers_the_other_way_round_are_worse(folder: Path) -> None:
    verdict, sentence = judged(folder, reference="abn")
    assert verdict == "worse"
    assert "bn - abn is -0.94 points (95 % interval -1.17 to -0.71" in sentence


def test_a_difference_within_the_noise_is_undecided_and_it_is_said_what_would_decide(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": [0.71, 0.70, 0.72, 0.71, 0.72]})
    verdict, sentence = judged(tmp_path)
    assert verdict == "undecided"
    assert "abn - bn is +0.20 points" in sentence
    j = only(build_report(tmp_path)).mean
    assert f"with 80 % power {j.detectable:.2f} points would be detected at this n" in sentence
    assert f"0.5 points take {j.seeds_for_delta} seeds" in sentence
    assert sentence.endswith(f"equivalence, where there is no difference, {j.seeds_for_equivalence}.")


def test_a_small_and_certain_difference_is_equivalent_and_says_so(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": [b + d for b, d in zip(BN, [0.002, 0.001, 0.0015, 0.002, 0.001], strict=True)]})
    verdict, sentence = judged(tmp_path)
    assert verdict == "equivalent"
    # mean 0.15, std 0.05: 90 % interval 0.15 +- 2.1318 * 0.05 / sqrt(5); t of +0.5 is -15.65, of -0.5 is 29.07
    assert "by two one-sided tests inside ±0.5 points (90 % interval 0.10 to 0.20, p < 0.001)" in sentence
    assert sentence.endswith("; higher, by less than 0.5 points (p = 0.0026).")


def test_holm_withdraws_what_many_comparisons_find_by_chance(tmp_path: Path) -> None:
    barely = [0.701, 0.718, 0.706, 0.722, 0.722]  # differences 0.1, 0.8, 0.1, 0.7, 0.2: t = 2.5, p = 0.068
    above = [0.703, 0.716, 0.707, 0.721, 0.722]  # 0.3, 0.6, 0.2, 0.6, 0.2: t = 4.1, p = 0.014
    study(tmp_path / "one", {"bn": BN, "abn": above})
    assert judged(tmp_path / "one")[0] == "better"
    others = dict.fromkeys(("a", "b", "c", "d"), barely)
    study(tmp_path / "many", {"bn": BN, "abn": above, **others})
    report = build_report(tmp_path / "many")
    j = next(c.mean for c in report.comparisons if c.cell.norm == "abn")
    assert j.corrected.difference == pytest.approx(5 * j.uncorrected.difference)
    assert j.verdict == "not worse by delta"  # p of -0.5 or less: 0.0005, times 5
    assert "uncorrected 95 % interval 0.13 to 0.63" in report.mean_sentence(report.comparisons[2].cell, j, "bn")


def spread_of(report: Report) -> tuple[str, str]:
    c = only(report)
    return c.spread.verdict, report.spread_sentence(c.cell, c.spread, report.reference)


def test_five_seeds_never_decide_on_spread(tmp_path: Path) -> None:
    study(tmp_path, {"bn": [0.69, 0.70, 0.71, 0.72, 0.73], "abn": [0.705, 0.71, 0.715, 0.72, 0.725]})
    verdict, sentence = spread_of(build_report(tmp_path))
    assert verdict == "undecided"
    assert "0.50 times the std of bn between seeds (0.79 against 1.58 points, n = 5 paired seeds)" in sentence
    takes = f"to notice a ratio of 2 in 80 % takes {pairs_needed()} pairs."
    assert sentence.endswith(f"undecided, the test needs 10 pairs; {takes}")


def test_spread_is_decided_where_the_seeds_suffice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    narrow, wide = 0.7 + 0.002 * rng.standard_normal(25), 0.7 + 0.01 * rng.standard_normal(25)
    study(tmp_path, {"bn": wide.tolist(), "abn": narrow.tolist()})
    verdict, sentence = spread_of(build_report(tmp_path))
    assert verdict == "better"
    assert sentence.endswith("better, less spread.")
    assert "at 5 % this test errs in " in sentence
    assert spread_of(build_report(tmp_path, reference="abn"))[0] == "worse"


@pytest.mark.parametrize("accuracies", [[], [0.7], [0.701, 0.711, 0.706, 0.716, 0.721], BN])
def test_too_little_to_compare_is_said_and_never_a_warning(accuracies: list[float], tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": accuracies})
    if not accuracies:
        start_run(tmp_path, "abn", 0)
    report = write_report(tmp_path)
    verdict, sentence = judged(tmp_path)
    assert verdict == "undecided"
    assert "nan" not in sentence
    assert "nan" not in (tmp_path / "report.md").read_text() + (tmp_path / "report.csv").read_text()
    print_report(report, Console(width=200, quiet=True))


@pytest.mark.usefixtures("no_figures")
def test_report_says_what_is_missing_and_why(folder: Path) -> None:
    shutil.rmtree(folder / "digits/binarynet/abn/fixed/seed-4")
    (start_run(folder, "bn", 5) / "FAILED").write_text("OutOfMemoryError: 2 GB | wanted\nmore")
    write_report(folder)
    text = (folder / "report.md").read_text()
    bn, abn = table_rows(section(text, "Test accuracy (%)"))
    assert (bn["n"], abn["n"]) == ("5/6", "4/6")
    assert abn["mean ± std"] == "71.65 ± 0.62"  # of 70.8, 72.0, 71.6, 72.2
    assert abn["min to max"] == "70.80 to 72.20"
    assert abn["best val epoch"] == "71.75 ± 0.62"
    missing = section(text, "Runs without a result")
    assert "bn, seed 5: failed: OutOfMemoryError: 2 GB | wanted more (4 epochs recorded)" in missing
    assert "abn, seed 4: not started" in missing
    seeds = table_rows(section(text, "Test accuracy (%) of every seed"))
    assert seeds[1] == {
        "norm": "abn",
        **{f"seed {i}": v for i, v in enumerate(["70.80", "72.00", "71.60", "72.20", "-", "-"])},
    }
    (difference,) = table_rows(section(text, "Differences to bn"))
    assert difference["n"] == "4 pairs"


@pytest.mark.usefixtures("no_figures")
def test_peak_on_the_test_set_is_shown_only_where_it_was_recorded(folder: Path, tmp_path: Path) -> None:
    write_report(folder)
    assert "peeking" not in (folder / "report.md").read_text()
    for seed in range(2):
        finish_run(tmp_path / "paper", "bn", seed, 0.7 + 0.01 * seed, peak=0.75)
    write_report(tmp_path / "paper")
    (row,) = table_rows(section((tmp_path / "paper/report.md").read_text(), "Test accuracy (%)"))
    assert row["best test epoch (peeking)"] == "75.00 ± 0.00"


@pytest.mark.usefixtures("no_figures")
def test_only_equal_dataset_model_and_variant_are_compared(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE})
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, dataset="cifar10")
    study(tmp_path, {"abn": BN}, variant="fixed-lr-0.5")
    report = build_report(tmp_path)
    assert [(c.cell.dataset, c.cell.norm, c.cell.variant) for c in report.comparisons] == [
        ("cifar10", "abn", "fixed"),
        ("digits", "abn", "fixed"),
    ]
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No comparison on digits with binarynet (fixed-lr-0.5): the reference norm bn was not run there." in text
    assert {row["variant"] for row in table_rows(section(text, "Test accuracy (%)"))} == {"fixed", "fixed-lr-0.5"}


def test_norms_of_other_options_each_are_told_apart(tmp_path: Path, no_figures: None) -> None:
    """Each norm with a learning rate of its own: no option varies within a norm, and none is compared."""
    study(tmp_path, {"bn": BN}, variant="fixed_lr-0.001", config=yaml.safe_dump({"recipe": {"lr": 0.001}}))
    study(tmp_path, {"abn": BN}, variant="fixed_lr-0.003", config=yaml.safe_dump({"recipe": {"lr": 0.003}}))
    report = write_report(tmp_path)
    assert report.comparisons == []
    text = (tmp_path / "report.md").read_text()
    rows = table_rows(section(text, "Test accuracy (%)"))
    assert [(row["lr"], row["norm"]) for row in rows] == [("0.001", "bn"), ("0.003", "abn")]
    assert "No comparison on digits with binarynet (lr 0.003): the reference norm bn was not run there." in text


def test_without_the_reference_norm_there_is_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path, {"abn": BN})
    report = write_report(tmp_path)
    assert report.comparisons == []
    assert not (tmp_path / "figures/differences.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "## Differences" not in text
    assert "No comparison on digits with binarynet: the reference norm bn was not run there." in text
    study(tmp_path, {"abn": BN}, dataset="cifar10")
    monkeypatch.setattr("abn_exp.report.build.draw", lambda report: {})
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("No comparison of norms: the reference norm bn was not run.") == text.count("No comparison") > 0


def everything_in(folder: Path) -> dict[str, bytes]:
    names = ["report.md", "report.csv", "runs.csv", "report.tex"]
    files = [folder / name for name in names] + sorted((folder / "figures").iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_written_twice_and_elsewhere_it_is_byte_for_byte_the_same(folder: Path, tmp_path: Path) -> None:
    write_report(folder)
    first = everything_in(folder)
    assert {
        f"{name}.{kind}" for name in ("learning_curves", "seeds", "differences", "spreads") for kind in ("png", "pdf")
    } < set(first)
    assert str(tmp_path).encode() not in b"".join(first.values())
    elsewhere = tmp_path / "deeper" / folder.name
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("figures", "report.*", "*.csv"))
    time.sleep(1.1)  # a date in a file has seconds
    write_report(elsewhere)
    assert everything_in(elsewhere) == first


def test_figures_are_embedded_relatively_and_stale_ones_removed(folder: Path) -> None:
    write_report(folder)
    embedded = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text())
    assert embedded == [f"figures/{name}.png" for name in ("learning_curves", "seeds", "differences", "spreads")]
    assert all((folder / path).read_bytes().startswith(b"\x89PNG") for path in embedded)
    write_report(folder, reference="absent")
    assert not list((folder / "figures").glob("differences.*"))


@pytest.mark.usefixtures("no_figures")
def test_csv_files_hold_the_numbers(folder: Path) -> None:
    write_report(folder)
    runs = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert [float(row["test_acc"]) for row in runs] == BN + CLEARLY_ABOVE
    assert (runs[0]["status"], runs[0]["seed"], runs[0]["test_acc_peak"], runs[0]["binary"]) == (
        "finished",
        "0",
        "",
        "900",
    )
    bn, abn = csv.DictReader((folder / "report.csv").read_text().splitlines())
    assert float(bn["test_acc_mean"]) == pytest.approx(71.0)
    assert bn["difference"] == ""
    assert float(abn["difference"]) == pytest.approx(0.94)
    assert (abn["verdict"], abn["spread_verdict"]) == ("better", "undecided")


@pytest.mark.usefixtures("no_figures")
def test_latex_is_a_booktabs_table_with_escaped_text(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn_noshift": CLEARLY_ABOVE})
    write_report(tmp_path)
    text = (tmp_path / "report.tex").read_text()
    assert text.startswith("\\begin{tabular}{lllrrrrrr}\n\\toprule\n")
    assert (
        "digits & binarynet & abn\\_noshift & 5 & 71.94 $\\pm$ 0.84 & 70.90 to 72.98 & "
        "$+$0.94 [0.71 to 1.17] & $<$0.001 & better \\\\"
    ) in text
    assert {line.count(" & ") for line in text.splitlines() if "&" in line} == {8}


@pytest.mark.usefixtures("no_figures")
def test_question_and_command(folder: Path) -> None:
    assert build_report(folder).command.splitlines() == [
        f"python train.py -m dataset=digits model=binarynet norm={norm} recipe=fixed seed=0,1,2,3,4 name=claims"
        for norm in ("bn", "abn")
    ]
    command = "python train.py -m norm=bn,abn seeds=five 'model.width=[1, 2]' hydra/launcher=joblib"
    (folder / "command.txt").write_text(f"{command}\n")
    finish_run(folder, "bn", 5, 0.7, variant="asked", config="question: Does the gate help?\n")
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert command in text
    assert "Does the gate help?" in text


@pytest.mark.usefixtures("no_figures")
def test_provenance_counts_what_differs(folder: Path) -> None:
    path = folder / "digits/binarynet/bn/fixed/seed-0/result.json"
    path.write_text(path.read_text().replace("2.15.0", "2.14.0"))
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)
    write_report(folder)
    assert "- torch: 2.14.0 (1 runs), 2.15.0 (9 runs)" in (folder / "report.md").read_text()


def test_the_same_run_in_two_studies_is_refused(tmp_path: Path) -> None:
    study(tmp_path / "a", {"bn": BN})
    study(tmp_path / "b", {"bn": BN})
    with pytest.raises(ValueError, match="hold the same run twice; give the folder of one study"):
        build_report(tmp_path)


def test_terminal_shows_accuracies_verdicts_and_gaps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(folder, "abn", 5)
    print_report(build_report(folder), Console(width=300))
    out = capsys.readouterr().out
    assert "71.94 ± 0.84" in out
    assert "abn - bn is +0.94 points" in out
    assert out.startswith("Exploratory throughout. Neither a primary comparison nor delta was fixed")
    assert "seed 5: unfinished" in out


def test_a_study_of_several_factors_is_readable_at_80_columns(tmp_path: Path) -> None:
    for estimator, epochs in product(("ste", "approxsign"), (10, 20)):
        config = f"recipe: {{epochs: {epochs}, optimizer: {{rebuild_each_epoch: false}}}}\n"
        config += f"model: {{binarization: {{activation_estimator: {estimator}}}}}\n"
        study(tmp_path, {"bn": BN, "abn_noshift": BN}, variant=f"fixed_{estimator}-{epochs}", config=config)
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(build_report(tmp_path), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if re.match(r"   bn +5 71.00 ± 0.79 70.02 to 71.98 *$", line)]) == 4
    assert len([line for line in lines if line.startswith(" digits, binarynet")]) == 4


def test_comparison_does_not_depend_on_what_else_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores = {norm: (0.7 + 0.01 * rng.standard_normal(12)).tolist() for norm in ("bn", "abn", "iebn")}
    study(tmp_path, scores)
    cells = collect_cells(find_runs(tmp_path))
    alone, both = compare_cells([cells[0], cells[2]], "bn", 0.5), compare_cells(cells, "bn", 0.5)
    assert alone[0].spread.found == both[1].spread.found
    assert alone[0].mean.mean == both[1].mean.mean


def test_every_norm_has_its_own_style_everywhere() -> None:
    norms = [*NORM_STYLES, *(f"norm{i}" for i in range(60))]
    styles = norm_styles(norms)
    assert len({(s.color, s.marker, str(s.linestyle)) for s in styles.values()}) == len(norms)
    assert len({s.marker for s in NORM_STYLES.values()}) == len(NORM_STYLES)
    assert norm_styles(["abn"])["abn"] == styles["abn"] == NORM_STYLES["abn"]
    assert norm_styles(["mine"])["mine"] == norm_styles(["mine", "bn", "abn"])["mine"]


# --- Several folders, and what varies ---


def test_runs_csv_has_a_column_for_each_option_that_varies(tmp_path: Path, no_figures: None) -> None:
    for epochs, lr in ((4, 0.1), (4, 0.01), (8, 0.1)):
        config = RECORDED.format(epochs=epochs, lr=lr)
        study(tmp_path / "s", {"bn": [0.7], "abn": [0.8]}, variant=f"fixed_epochs-{epochs}_lr-{lr}", config=config)
    write_report(tmp_path / "s")
    rows = list(csv.DictReader((tmp_path / "s" / "runs.csv").read_text().splitlines()))
    assert {(row["recipe.epochs"], row["recipe.optimizer.lr"]) for row in rows} == {
        ("4", "0.1"),
        ("4", "0.01"),
        ("8", "0.1"),
    }
    assert not {"model.width", "precision", "dataset.name", "norm._target_"} & rows[0].keys()


def test_folders_are_compared_in_one_report(tmp_path: Path, no_figures: None) -> None:
    config = RECORDED.format(epochs=4, lr=0.1)
    study(tmp_path / "a", {"bn": BN}, config=config)
    study(tmp_path / "b", {"abn": CLEARLY_ABOVE}, config=config)
    report = build_report(tmp_path / "a", tmp_path / "b")
    assert (report.name, report.factors) == ("a and b", [])
    assert only(report).mean.mean.difference == pytest.approx(0.94)  # paired, as of one folder
    assert report.command.count("\n") == 1
    assert write_report(tmp_path / "a", tmp_path / "b", out=tmp_path / "both").cells
    assert (tmp_path / "both" / "report.md").is_file()
    assert not (tmp_path / "a" / "report.md").exists()
    with pytest.raises(ValueError, match="There are no runs below"):
        build_report(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("variant", ["fixed", "fixed_by-another-name"])
def test_the_same_run_in_two_folders_is_refused(tmp_path: Path, variant: str) -> None:
    config = RECORDED.format(epochs=4, lr=0.1)
    study(tmp_path / "a", {"bn": BN}, config=config)
    study(tmp_path / "b", {"bn": BN[:1]}, variant=variant, config=config)
    with pytest.raises(ValueError, match=r"a/digits/.*seed-0 and .*b/digits/.*seed-0 hold the same run twice"):
        build_report(tmp_path / "a", tmp_path / "b")


def test_a_part_of_a_data_set_is_a_cell_of_its_own(tmp_path: Path) -> None:
    """Though it has the whole one's name: as in a folder of before the number of images was recorded."""
    config = RECORDED.format(epochs=4, lr=0.1)
    study(tmp_path / "whole", {"bn": BN}, config=config)
    study(tmp_path / "part", {"bn": BN}, config=config)
    for directory in (run.directory for run in find_runs(tmp_path / "part")):
        (directory / "train.log").write_text("cifar10 has 100 + 50 images here; the full set has 50000 + 10000\n")
    report = build_report(tmp_path / "whole", tmp_path / "part")
    (factor,) = report.factors
    assert (factor.name, set(factor.levels)) == ("dataset.images", {"null", "[100, 50]"})
    assert [len(cell.runs) for cell in report.cells] == [5, 5]

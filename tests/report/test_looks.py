"""What was fixed before the runs, the verdict on it, planned looks and unplanned ones."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats as st

from abn_exp.errors import DamagedFile
from abn_exp.report import build
from abn_exp.report.build import build_report, draw, html_page, write_report
from abn_exp.report.comparisons import Cell, collect_cells
from abn_exp.report.looks import Plan, fixed_before, look, read_plan, write_plan
from abn_exp.report.sequential import nominal_levels
from abn_exp.report.stats import MeanComparison
from abn_exp.report.tables import checkpoint_selection_tables, difference_table, pooled_table, spread_table
from abn_exp.report.verdicts import sentence, t_tests
from abn_exp.results import find_runs
from abn_exp.trained_network import InputFormat, write_input_format
from tests.helpers.records import BN, CLEARLY_ABOVE, finish_run, section, start_run, study, table_rows

pytestmark = pytest.mark.usefixtures("no_figures")


def fixed(statistic: str = "mean", delta: float = 0.5, **primary: Any) -> str:
    primary = {"norm": "abn", "reference": "bn", "datasets": None, "models": None, **primary}
    return yaml.safe_dump({"delta": delta, "primary": {**primary, "statistic": statistic}})


def first_line(folder: Path) -> str:
    return (folder / "report.md").read_text().split("\n\n")[1]


def test_what_the_runs_agree_on_was_fixed() -> None:
    primary = {"norm": "abn", "reference": "bn", "datasets": ["cifar10"], "models": None, "statistic": "pooled"}
    found = fixed_before([{"delta": 0.3, "primary": primary}] * 2)
    assert found.question is not None
    assert (found.delta, found.question.datasets, found.question.statistic) == (0.3, ["cifar10"], "pooled")
    assert found.note == "The primary comparison and delta = 0.3 points were fixed before the runs."
    assert fixed_before([{"delta": 0.3, "primary": None}]).question is None
    older = fixed_before([{"question": "?"}])
    assert (older.delta, older.question) == (0.5, None)
    assert older.note.endswith("was fixed before these runs; delta = 0.5 points was applied afterwards.")
    assert "some of these runs" in fixed_before([{}, {"delta": 0.3, "primary": None}]).note
    assert "different values of delta" in fixed_before([{"delta": 0.3}, {"delta": 1.0}]).note
    mixed = fixed_before([{"delta": 0.3, "primary": primary}, {"delta": 0.3, "primary": None}])
    assert (mixed.delta, mixed.question) == (0.3, None)


def test_the_verdict_on_the_primary_comparison_is_the_first_line(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=fixed(delta=0.3))
    write_report(tmp_path)
    assert first_line(tmp_path) == (
        "**Primary comparison: abn against bn. On digits with binarynet, abn - bn is +0.94 points (95 % interval "
        "0.71 to 1.17, n = 5 paired seeds): better, by the two-sided test of no difference (p < 0.001).**"
    )
    assert (
        "- The primary comparison and delta = 0.3 points were fixed before the runs."
        in (tmp_path / "report.md").read_text()
    )


def test_the_correction_is_over_the_primary_family_alone(tmp_path: Path) -> None:
    barely = [0.703, 0.716, 0.707, 0.721, 0.722]  # p = 0.014
    for dataset in ("cifar10", "digits"):
        norms = {"bn": BN, "abn": barely, "iebn": barely}
        study(tmp_path, norms, config=fixed(datasets=["digits"]), dataset=dataset)
    report = write_report(tmp_path)
    family = {(c.cell.dataset, c.cell.norm): (c.primary, c.mean.family, c.mean.verdict) for c in report.comparisons}
    assert family["digits", "abn"] == (True, 1, "better")
    assert {family[key] for key in family if key != ("digits", "abn")} == {(False, 3, "better")}
    assert report.comparisons[0].mean.corrected.difference == pytest.approx(3 * 0.0147, abs=0.002)
    rows = table_rows(section((tmp_path / "report.md").read_text(), "Differences to bn"))
    assert [row["family"] for row in rows] == ["exploratory (3)", "exploratory (3)", "primary (1)", "exploratory (3)"]


def test_a_pooled_and_a_spread_primary_comparison(tmp_path: Path) -> None:
    for dataset in ("cifar10", "digits"):
        study(tmp_path / "pooled", {"bn": BN, "abn": CLEARLY_ABOVE}, config=fixed("pooled"), dataset=dataset)
    write_report(tmp_path / "pooled")
    assert first_line(tmp_path / "pooled").startswith(
        "**Primary comparison: abn against bn. Over 2 cells, abn - bn is +0.94 points"
    )
    rng = np.random.default_rng(0)
    scores = {"bn": (0.7 + 0.01 * rng.standard_normal(12)).tolist(), "abn": (0.7 + 0.001 * rng.random(12)).tolist()}
    study(tmp_path / "spread", scores, config=fixed("spread"))
    report = write_report(tmp_path / "spread")
    assert first_line(tmp_path / "spread").endswith("better, less spread.**")
    assert report.comparisons[0].primary is False  # the difference of means is not what was asked
    study(tmp_path / "none", {"bn": BN}, config=fixed())
    write_report(tmp_path / "none")
    assert first_line(tmp_path / "none") == ("**Primary comparison: abn against bn. It has no runs in this folder.**")


def test_between_looks_there_is_neither_verdict_nor_interval(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE, "iebn": BN[::-1]}, config=fixed())
    report = build_report(tmp_path, interim=True)
    assert [c.cell.norm for c in report.comparisons] == ["iebn"]
    assert report.answer() == [
        "Primary comparison: abn against bn. It is judged when all runs of the sweep have come to their end."
    ]


def test_a_sweep_that_was_stopped_is_not_judged_and_is_no_look(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE[:4], "iebn": BN[::-1]}, config=fixed())
    begun = start_run(tmp_path, "abn", 4, config=fixed())
    report = write_report(tmp_path)
    assert report.answer()[0].startswith(
        "Primary comparison: abn against bn. It is not judged yet: one of its runs has not come to an end."
    )
    assert [c.cell.norm for c in report.comparisons] == ["iebn"]
    assert any(note.startswith("Until it is judged, its row is left out") for note in report.notes())
    assert list(json.loads((tmp_path / "looks.json").read_text())) == ["digits/binarynet/iebn/fixed"]
    (begun / "FAILED").write_text("diverged")
    assert build_report(tmp_path).answer()[0].startswith("Primary comparison: abn against bn. On digits")


def test_it_is_not_judged_by_some_of_its_cells_while_others_have_not_begun(tmp_path: Path) -> None:
    """A sweep goes from cell to cell, and may be stopped after the first."""
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=fixed("pooled"))
    for norm, seed in product(("bn", "abn", "iebn"), range(5)):
        (start_run(tmp_path, norm, seed, "cifar10", config=fixed("pooled")) / "metrics.jsonl").unlink()
    report = write_report(tmp_path)
    assert report.answer()[0].startswith(
        "Primary comparison: abn against bn. It is not judged yet: 10 of its runs have not come to an end."
    )
    assert {cell.dataset for cell in report.cells} == {"digits"}
    assert not (tmp_path / "looks.json").exists()


def test_more_seeds_in_another_folder_are_no_second_look_at_a_primary_comparison(tmp_path: Path) -> None:
    study(tmp_path / "first", {"bn": BN, "abn": BN[::-1]}, config=fixed())
    for seed in range(5, 10):
        for norm, scores in (("bn", BN), ("abn", CLEARLY_ABOVE)):
            finish_run(tmp_path / "more", norm, seed, scores[seed - 5], config=fixed())
    assert build_report(tmp_path / "first").primary is not None
    report = build_report(tmp_path / "first", tmp_path / "more")
    assert report.primary is None
    assert report.answer()[0].startswith("Exploratory throughout. A primary comparison was fixed for one of these")
    assert [(c.mean.mean.n, c.primary) for c in report.comparisons] == [((10, 10), False)]


def test_what_is_withheld_is_not_in_the_table_of_epochs_either(tmp_path: Path) -> None:
    for norm, scores in {"bn": BN, "abn": CLEARLY_ABOVE, "iebn": BN[::-1]}.items():
        for seed, score in enumerate(scores):
            finish_run(tmp_path, norm, seed, score, peak=score + 0.01, config=fixed())
    for interim, shown in ((True, ["iebn"]), (False, ["abn", "iebn"])):
        _, (header, rows) = checkpoint_selection_tables(build_report(tmp_path, interim=interim))
        assert [row[header.index("norm")] for row in rows] == shown


def test_the_primary_comparison_is_judged_once(tmp_path: Path) -> None:
    """It would be another family, and at a look another level, in the tables of contrasts and of pooled effects."""
    barely = [0.701, 0.719, 0.7065, 0.7265, 0.7235]
    other = [0.721, 0.691, 0.716, 0.706, 0.751]
    for dataset in ("cifar10", "digits"):
        norms = {"bn": BN, "abn": barely, "abn_paper": other}
        study(tmp_path / "pooled", norms, config=fixed("pooled", delta=0.05), dataset=dataset)
    report = write_report(tmp_path / "pooled")
    text = (tmp_path / "pooled" / "report.md").read_text()
    assert report.primary is not None
    assert [(p.norm, p.primary, p.judgement.family) for p in report.pooled] == [
        ("abn", True, 1),
        ("abn_paper", False, 1),
    ]
    assert report.pooled[0].judgement is report.primary.pooled
    assert "## One effect over all cells\n" in text
    assert "Over 2 cells (exploratory), abn - bn" not in html_page(report)
    header, rows = pooled_table(report)
    assert [row[header.index("family")] for row in rows] == ["primary (1)", "exploratory (1)"]
    turned = build_report(tmp_path / "pooled", reference="abn")
    assert [p.norm for p in turned.pooled] == ["abn_paper"]  # bn - abn would be its opposite

    norms = {"bn": BN, "bn_noscale": BN[::-1], "abn": CLEARLY_ABOVE}
    study(tmp_path / "contrast", norms, config=fixed(reference="bn_noscale"))
    (contrasts,) = build_report(tmp_path / "contrast").effects
    assert [effect.labels[-1] for effect in contrasts.effects] == ["bn - bn_noscale"]
    study(tmp_path / "reversed", {"bn": BN, "abn": CLEARLY_ABOVE, "iebn": BN[::-1]}, config=fixed())
    report = build_report(tmp_path / "reversed", reference="abn")
    assert [c.cell.norm for c in report.comparisons] == ["iebn"]
    assert report.answer()[0].startswith("Primary comparison: abn against bn. On digits")


def test_a_primary_spread_is_not_called_exploratory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    scores = {"bn": (0.7 + 0.01 * rng.standard_normal(12)).tolist(), "abn": (0.7 + 0.001 * rng.random(12)).tolist()}
    build.print_report(write_report(study(tmp_path, scores, config=fixed("spread"))))
    assert "## Spread between seeds, against bn\n" in (tmp_path / "report.md").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("times the std of bn") == 1
    assert printed.count("Exploratory:") == 1  # the difference of means
    assert build_report(tmp_path, reference="abn").comparisons == []


def test_the_interval_of_a_std_is_over_the_seeds_of_that_std(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scores = {"bn": (0.7 + 0.01 * rng.standard_normal(10)).tolist(), "abn": (0.7 + 0.01 * rng.random(14)).tolist()}
    header, (row,) = spread_table(build_report(study(tmp_path, scores)))
    shown = dict(zip(header, row, strict=True))
    std = 100 * np.std(scores["abn"][:10], ddof=1)
    low, high = (std * math.sqrt(9 / st.chi2.ppf(p, 9)) for p in (0.975, 0.025))
    assert (shown["n"], shown["std (points)"]) == ("10 pairs", f"{std:.2f}")
    assert shown["95 % interval"] == f"{low:.2f} to {high:.2f}"


# --- failures ---


def test_failures_take_back_a_verdict_and_say_so(tmp_path: Path) -> None:
    config = yaml.safe_dump({"dataset": {"num_classes": 10}})
    study(tmp_path, {"bn": [*BN, 0.71, 0.705], "abn": CLEARLY_ABOVE}, config=config)
    for seed in (5, 6):
        (start_run(tmp_path, "abn", seed, config=config) / "FAILED").write_text("diverged: the loss is nan")
    report = build_report(tmp_path)
    (c,) = report.comparisons
    assert (c.mean.failed, c.mean.without_failures, c.mean.verdict) == ((2, 0), "better", "undecided")
    # at chance: differences 0.8, 1.0, 1.1, 0.7, 1.1, 10 - 71, 10 - 70.5
    d = np.array([0.8, 1.0, 1.1, 0.7, 1.1, -61, -60.5])
    assert c.mean.uncorrected.not_worse == pytest.approx(st.ttest_1samp(d, -0.5, alternative="greater").pvalue)
    text = report.mean_sentence(c.cell, c.mean, "bn")
    assert text.endswith(
        "abn failed in 2 runs, bn in 0: without them the verdict would be better, which does not hold when they "
        "count."
    )
    for seed in (5, 6):
        (tmp_path / f"digits/binarynet/bn/fixed/seed-{seed}/result.json").unlink()
        (tmp_path / f"digits/binarynet/bn/fixed/seed-{seed}/FAILED").write_text("diverged")
    assert build_report(tmp_path).comparisons[0].mean.verdict == "better"


def test_failures_at_seeds_that_the_other_norm_has_not_run_count_too(tmp_path: Path) -> None:
    """No pair of these seeds can count them, so that nothing is said in favour of what failed."""
    config = yaml.safe_dump({"dataset": {"num_classes": 10}})
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=config)
    assert build_report(tmp_path).comparisons[0].mean.verdict == "better"
    for seed in range(5, 10):
        (start_run(tmp_path, "abn", seed, config=config) / "FAILED").write_text("diverged: the loss is nan")
    (c,) = build_report(tmp_path).comparisons
    assert (c.mean.failed, c.mean.without_failures, c.mean.verdict) == ((5, 0), "better", "undecided")
    assert (c.mean.uncorrected.difference, c.mean.uncorrected.not_worse) == (1, 1)
    assert c.mean.uncorrected.not_better == t_tests(*_of(c.mean.mean), 0.5).not_better  # what speaks against it stays


def test_unpaired_failures_count_at_chance(tmp_path: Path) -> None:
    config = yaml.safe_dump({"dataset": {"num_classes": 10}})
    study(tmp_path, {"bn": BN}, config=config)
    for seed, score in enumerate(CLEARLY_ABOVE, 10):
        finish_run(tmp_path, "abn", seed, score + 0.02, config=config)
    (start_run(tmp_path, "abn", 20, config=config) / "FAILED").write_text("diverged: the loss is nan")
    (c,) = build_report(tmp_path).comparisons
    scores = [100 * x + 2 for x in CLEARLY_ABOVE]
    expected = st.ttest_ind([*scores, 10.0], [100 * x for x in BN], equal_var=False).pvalue
    assert (c.mean.mean.method, c.mean.without_failures, c.mean.verdict) == ("welch", "better", "undecided")
    assert c.mean.uncorrected.difference in (pytest.approx(expected), 1.0)  # 1: it would be lower


def _of(mean: MeanComparison) -> tuple[float, float, float]:
    return mean.difference, mean.standard_error, mean.df


def test_failures_take_back_a_smaller_spread(tmp_path: Path) -> None:
    """The candidate's worst seeds diverged: what is left of it varies little, which says nothing for it."""
    rng, config = np.random.default_rng(0), yaml.safe_dump({"dataset": {"num_classes": 10}})
    bn = [0.7 + 0.02 * float(x) for x in rng.standard_normal(14)]
    abn = [0.7 + 0.002 * float(x) for x in rng.standard_normal(12)]
    study(tmp_path, {"bn": bn, "abn": abn}, config=config)
    (c,) = build_report(tmp_path).comparisons
    assert (c.spread.verdict, c.spread.failed) == ("better", (0, 0))
    for seed in (12, 13):
        (start_run(tmp_path, "abn", seed, config=config) / "FAILED").write_text("diverged: the loss is nan")
    report = build_report(tmp_path)
    (c,) = report.comparisons
    assert (c.spread.failed, c.spread.without_failures, c.spread.verdict) == ((2, 0), "better", "undecided")
    assert c.spread.found.p < 0.05
    assert c.spread.p_holm == 1
    for seed in (12, 13):  # or at seeds that bn has not run
        shutil.rmtree(tmp_path / f"digits/binarynet/bn/fixed/seed-{seed}")
    (c,) = build_report(tmp_path).comparisons
    assert (c.spread.without_failures, c.spread.verdict, c.spread.p_holm) == ("better", "undecided", 1)
    assert report.spread_sentence(c.cell, c.spread, "bn").endswith(
        "undecided; abn failed in 2 runs, bn in 0: without them the verdict would be better, which does not hold "
        "when they count."
    )


def test_a_cell_that_only_failed_is_not_left_out_of_the_pooled_effect(tmp_path: Path) -> None:
    config = yaml.safe_dump({"dataset": {"num_classes": 10}})
    for model in ("binarynet", "vgg_small", "resnet18"):
        study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE if model != "resnet18" else []}, model=model, config=config)
    assert [p.judgement.verdict for p in build_report(tmp_path).pooled] == ["better"]  # of the two that were run
    for seed in range(5):
        (start_run(tmp_path, "abn", seed, model="resnet18", config=config) / "FAILED").write_text("diverged")
    (pooled,) = build_report(tmp_path).pooled
    assert (len(pooled.cells), pooled.judgement.verdict) == (3, "undecided")


def test_chance_in_a_folder_of_images_is_that_of_the_classes_found_there(tmp_path: Path) -> None:
    directory = finish_run(tmp_path, "abn", 0, 0.7, config=yaml.safe_dump({"dataset": {"num_classes": None}}))
    (start_run(tmp_path, "abn", 1) / "FAILED").write_text("diverged")
    (cell,) = cells_of(tmp_path)
    np.testing.assert_allclose(cell.sample_at_chance([0, 1]), [70, 0])  # not known: at least nothing in its favour
    write_input_format(directory, InputFormat(8, (0.5,) * 3, (0.2,) * 3, ("a", "b", "c", "d")))
    (directory / "SHA256SUMS").unlink()
    (cell,) = cells_of(tmp_path)
    np.testing.assert_allclose(cell.sample_at_chance([0, 1]), [70, 25])


# --- planned looks ---

PLAN = Plan("abn", "bn", (("digits", "binarynet", "fixed"),), 0.5, (3, 5), (0, 1, 2, 3, 4), "pocock")


def plan_in(folder: Path) -> Plan:
    plan = read_plan(folder)
    assert plan is not None
    return plan


def cells_of(folder: Path) -> list[Cell]:
    return collect_cells(find_runs(folder))


def test_a_look_is_judged_by_its_seeds_at_its_levels(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE})
    j = PLAN.judge(cells_of(tmp_path), 0)
    assert j.mean.differences == pytest.approx([0.8, 1.0, 1.1])
    level = nominal_levels((3, 5), 0.025, "pocock")[0]
    assert (j.level, j.level_delta) == (2 * level, nominal_levels((3, 5), 0.05, "pocock")[0])
    half = st.t.isf(level, 2) * np.std([0.8, 1.0, 1.1], ddof=1) / math.sqrt(3)
    assert j.interval == pytest.approx((0.9667 - half, 0.9667 + half), abs=1e-3)
    p = st.ttest_1samp([0.8, 1.0, 1.1], 0).pvalue
    assert (j.verdict == "better") == (p < j.level)


def test_an_undecided_look_shows_each_p_beside_what_it_is_to_be_below(tmp_path: Path) -> None:
    """Both may be below 0.001, and the one not below the other."""
    plan = replace(PLAN, looks=(5, 20), seeds=tuple(range(20)), spending="obrien_fleming")
    study(tmp_path, {"bn": BN, "abn": [above + 0.002 * (i % 2) for i, above in enumerate(BN)]})
    j = plan.judge(cells_of(tmp_path), 0)
    assert j.verdict == "undecided"
    assert j.level_delta < j.uncorrected.not_better < 0.001
    text = sentence(j, "abn - bn")
    p = j.uncorrected
    both = f"p = {p.not_better:.3g} and {p.not_worse:.3g}, level {j.level_delta:.3g})"
    assert f"one-sided against +0.5 points and -0.5 points: {both}" in text
    assert f"(no difference: p = {p.difference:.3g}, level {j.level:.3g};" in text
    assert "points would be detected at this look, and without looks 0.5 points take" in text


def test_entries_are_kept_and_the_report_follows_them(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": [0.702, 0.701, 0.716, 0.722, 0.731], "iebn": BN[::-1]})
    write_plan(tmp_path, PLAN)
    before = build_report(tmp_path)
    assert before.answer() == ["Primary comparison: abn against bn. It is judged at 3 seeds, look 1 of 2."]
    assert [c.cell.norm for c in before.comparisons] == ["iebn"]
    assert before.pooled == before.effects == before.images.pairs == []
    for reference in ("abn", "iebn"):  # nor seen from the other side, nor as a part of something else
        other = build_report(tmp_path, reference=reference)
        pairs = [{c.cell.norm, c.base.norm} for c in other.comparisons]
        assert pairs
        assert {"bn", "abn"} not in pairs
        assert other.pooled == other.effects == other.images.pairs == []
    plan = plan_in(tmp_path)
    look(tmp_path, plan, cells_of(tmp_path), "2026-01-01")
    assert (plan.entries[0]["verdict"], plan.entries[0]["pairs"], plan.decided) == ("undecided", 3, False)
    (entry,) = plan.entries
    found = f"{entry['difference']:+.2f} points (sequential 95 % interval {entry['interval'][0]:.2f} to "
    assert build_report(tmp_path).answer() == [  # seeds 3 and 4 are there
        "Primary comparison: abn against bn. It is judged at 5 seeds, look 2 of 2. Look 1, at 3 seeds: "
        f"{found}{entry['interval'][1]:.2f}), undecided."
    ]
    plan = plan_in(tmp_path)
    look(tmp_path, plan, cells_of(tmp_path), "2026-01-02")
    assert plan.decided
    assert [entry["date"] for entry in plan_in(tmp_path).entries] == ["2026-01-01", "2026-01-02"]
    finish_run(tmp_path, "bn", 7, 0.1)
    finish_run(tmp_path, "abn", 7, 0.9)
    answer = build_report(tmp_path).answer()[0]
    assert "(look 2 of 2, at 5 seeds; seeds that no look asked for are left out: 7)" in answer
    assert "n = 5 paired seeds" in answer
    assert "sequential 95 % interval" in answer


def test_figures_and_tables_show_the_sequential_interval_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(tmp_path, {"bn": BN, "abn": [0.702, 0.701, 0.716, 0.722, 0.731], "iebn": BN[::-1]})
    write_plan(tmp_path, replace(PLAN, looks=(5, 20), seeds=tuple(range(20)), delta=500.0))
    plan = plan_in(tmp_path)
    look(tmp_path, plan, cells_of(tmp_path), "2026-01-01")
    assert plan.decided  # at the first look, by the least that it may use of its error
    report = build_report(tmp_path)
    (j,) = [c.mean for c in report.comparisons if c.cell.norm == "abn"]
    low, high = plan.entries[0]["interval"]
    assert j.interval == pytest.approx((low, high))
    assert high - low > 1.3 * np.ptp(j.mean.interval)
    drawn: dict[str, Any] = {}
    keep = lambda panels, *kind: drawn.update(panels=panels, kind=kind)  # noqa: E731
    monkeypatch.setattr(build.figures, "paired_differences", keep)
    draw(report)
    (panel,) = drawn["panels"].values()
    assert panel["abn"].interval == pytest.approx((low, high))
    assert panel["iebn"].interval == pytest.approx(
        next(c.mean.mean.interval for c in report.comparisons if c.cell.norm == "iebn")
    )
    assert drawn["kind"] == ("bn", ", primary: sequential")
    assert "95 % interval, uncorrected, primary: sequential" in difference_table(report)[0]
    assert "sequential" in html_page(report)
    assert any("All other intervals take the number of seeds as fixed" in note for note in report.notes())
    assert "sequential" not in " ".join(build_report(study(tmp_path / "other", {"bn": BN, "abn": BN[::-1]})).notes())


def test_a_run_that_failed_by_a_look_counts(tmp_path: Path) -> None:
    config = yaml.safe_dump({"dataset": {"num_classes": 10}})
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE[:4]}, config=config)
    (start_run(tmp_path, "abn", 4, config=config) / "FAILED").write_text("diverged")
    write_plan(tmp_path, PLAN)
    look(tmp_path, plan_in(tmp_path), cells_of(tmp_path), "2026-01-01")
    j = PLAN.judge(cells_of(tmp_path), 1)
    assert (j.failed, j.without_failures, j.verdict) == ((1, 0), "better", "undecided")


def test_a_plan_is_that_of_its_own_folder(tmp_path: Path) -> None:
    """A second folder beside it is no way around its levels."""
    study(tmp_path / "planned", {"bn": BN, "abn": [b + 0.003 * (i % 2) for i, b in enumerate(BN)]}, config=fixed())
    write_plan(tmp_path / "planned", replace(PLAN, looks=(5, 20), seeds=tuple(range(20)), spending="obrien_fleming"))
    look(tmp_path / "planned", plan := plan_in(tmp_path / "planned"), cells_of(tmp_path / "planned"), "2026-01-01")
    study(tmp_path / "more", {"iebn": BN[::-1]}, config=fixed())
    assert not plan.decided
    report = build_report(tmp_path / "planned", tmp_path / "more")
    assert report.answer() == [
        "Exploratory throughout. A primary comparison was fixed for one of these folders, and its verdict is in the "
        "report of that folder alone: runs added to it would be another look."
    ]
    assert [c.cell.norm for c in report.comparisons] == ["iebn"]
    plan.entries[0]["verdict"] = "equivalent"
    write_plan(tmp_path / "planned", plan)
    report = build_report(tmp_path / "planned", tmp_path / "more")
    assert [c.cell.norm for c in report.comparisons] == ["abn", "iebn"]


def test_a_run_on_another_kind_of_device_leaves_a_plan_as_it_was(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=fixed(), device="CPU (AMD EPYC, 1 thread)")
    write_plan(tmp_path, PLAN)
    finish_run(tmp_path, "iebn", 0, 0.7, device="NVIDIA H200", config=fixed())
    assert build_report(tmp_path).comparisons == []
    look(tmp_path, plan_in(tmp_path), cells_of(tmp_path), "2026-01-01")
    assert plan_in(tmp_path).entries[0]["pairs"] == 3
    finish_run(tmp_path, "bn", 9, 0.7, device="NVIDIA H200", config=fixed())  # without its partner: a pair is missing
    with pytest.raises(ValueError, match="was run on several kinds of device"):
        look(tmp_path, plan_in(tmp_path), cells_of(tmp_path), "2026-01-02")
    finish_run(tmp_path, "abn", 9, 0.7, device="NVIDIA H200", config=fixed())
    with pytest.raises(ValueError, match="was run on several kinds of device"):
        look(tmp_path, plan_in(tmp_path), cells_of(tmp_path), "2026-01-02")
    plan = plan_in(tmp_path)
    plan.entries[0]["verdict"] = "better"
    write_plan(tmp_path, plan)
    assert build_report(tmp_path).answer()[0].endswith("several kinds of device, which are not averaged.")


def test_what_is_damaged_is_waited_for(tmp_path: Path) -> None:
    """The command restores it, and would judge the comparison a second time."""
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=fixed())
    assert "better" in build_report(tmp_path).answer()[0]
    (run,) = tmp_path.glob("*/*/abn/*/seed-3")
    (run / "result.json").write_text("{")
    (answer,) = build_report(tmp_path).answer()
    assert "It is not judged yet: one of its runs has not come to an end, or cannot be read." in answer


def test_a_pooled_comparison_is_on_one_kind_of_device(tmp_path: Path) -> None:
    """Also where the runs on another have no partner there: pairs would be missing."""
    for dataset in ("cifar10", "digits"):
        norms = {"bn": BN, "abn": CLEARLY_ABOVE}
        study(tmp_path, norms, config=fixed("pooled"), dataset=dataset, device="CPU (AMD EPYC, 1 thread)")
    assert "better" in build_report(tmp_path).answer()[0]
    finish_run(tmp_path, "bn", 7, 0.7, dataset="digits", device="NVIDIA H200", config=fixed("pooled"))
    assert "It was run on several kinds of device" in build_report(tmp_path).answer()[0]


def test_a_plan_that_is_not_whole_is_a_sentence(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    for text in ("{", "[]", '{"looks": [5, 3], "seeds": [], "groups": []}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(DamagedFile, match=r"plan\.json"):
            read_plan(tmp_path)
    with pytest.raises(ValueError, match="not all there"):
        PLAN.judge([], 0)


def test_what_contradicts_a_plan_is_told() -> None:
    other = Plan("abn", "bn", PLAN.groups, 1.0, (3, 6), tuple(range(6)), "pocock")
    assert PLAN.contradictions(PLAN) == []
    assert PLAN.contradictions(other) == [
        "delta 0.5, not 1.0",
        "looks 3, 5, not 3, 6",
        "seeds 0, 1, 2, 3, 4, not 0, 1, 2, 3, 4, 5",
    ]


# --- looks without a plan ---


def test_seeds_added_between_reports_without_a_plan_are_told(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN[:3], "abn": CLEARLY_ABOVE[:3]})
    assert write_report(tmp_path).unplanned == []
    start_run(tmp_path, "abn", 3)
    assert write_report(tmp_path).unplanned == []  # it has no score yet
    for seed in (3, 4):
        finish_run(tmp_path, "bn", seed, BN[seed])
    finish_run(tmp_path, "abn", 4, CLEARLY_ABOVE[4])
    first = write_report(tmp_path), (tmp_path / "report.md").read_bytes()
    assert first[0].unplanned == [3]
    assert "reports were written at 3 seeds before this one" in (tmp_path / "report.md").read_text()
    write_report(tmp_path)
    assert (tmp_path / "report.md").read_bytes() == first[1]
    assert json.loads((tmp_path / "looks.json").read_text()) == {"digits/binarynet/abn/fixed": [3, 4]}


def test_seeds_count_where_both_norms_have_them(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN[:3], "abn": CLEARLY_ABOVE[:4]})
    assert write_report(tmp_path).unplanned == []
    finish_run(tmp_path, "abn", 4, CLEARLY_ABOVE[4])
    assert write_report(tmp_path).unplanned == []  # no pair more
    finish_run(tmp_path, "bn", 3, BN[3])
    assert write_report(tmp_path).unplanned == [3]


def test_seeds_that_are_not_paired_count_by_the_norm_with_fewer(tmp_path: Path) -> None:
    study(tmp_path, {"abn": CLEARLY_ABOVE})
    for seed, score in enumerate(BN, 9):
        finish_run(tmp_path, "bn", seed, score)
    assert write_report(tmp_path).unplanned == []
    for seed, score in enumerate(CLEARLY_ABOVE, 5):  # seed 9 is a pair
        finish_run(tmp_path, "abn", seed, score)
    for seed, score in enumerate(BN, 14):
        finish_run(tmp_path, "bn", seed, score)
    assert write_report(tmp_path).unplanned == [5]


@pytest.mark.parametrize("content", ["", "[]", '{"digits/binarynet/abn/fixed": 3}'])
def test_a_damaged_file_of_looks_is_named(tmp_path: Path, content: str) -> None:
    study(tmp_path, {"bn": BN[:3], "abn": CLEARLY_ABOVE[:3]})
    (tmp_path / "looks.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"looks\.json is damaged"):
        write_report(tmp_path)

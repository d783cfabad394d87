"""Evidence from test predictions, made up ones and those of trained networks."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as st
from sklearn.metrics import confusion_matrix
from statsmodels.stats.contingency_tables import mcnemar

from abn_exp.data.prepare import load
from abn_exp.report import build, per_image
from abn_exp.report.build import print_report, write_report
from abn_exp.report.image_stats import crossed_mean, split_spread
from abn_exp.results import Run, find_runs
from abn_exp.trained_network import Predictions, load_input_format, load_network
from tests.helpers.records import BN, CLEARLY_ABOVE, section, study, table_rows
from tests.helpers.runs import trained_study

LABELS = np.random.default_rng(0).integers(0, 10, size=400)


def predict(run: Run) -> Predictions | None:
    """Predictions that are right as often as the run's record says, but for one run that has kept none."""
    if (run.norm, run.seed) == ("abn", 4):
        return None
    assert run.result is not None
    rng = np.random.default_rng([run.seed, run.norm == "abn"])
    right = rng.permutation(400) < 400 * run.result.test_acc
    return Predictions(np.where(right, LABELS, (LABELS + 1) % 10), right, None, None, "digest")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "draw", lambda report: {})
    monkeypatch.setattr(per_image, "read_predictions", predict)
    return study(tmp_path / "images", {"bn": BN, "abn": CLEARLY_ABOVE})


def test_cells_and_pairs_are_gathered_and_what_is_missing_is_said(folder: Path) -> None:
    report = write_report(folder)
    bn, abn = report.images.cells
    assert (bn.seeds, abn.seeds) == ((0, 1, 2, 3, 4), (0, 1, 2, 3))
    correct = {
        norm: np.array([found.last_correct for run in cell.runs if (found := predict(run)) is not None])
        for norm, cell in (("bn", bn.cell), ("abn", abn.cell))
    }
    assert bn.split == split_spread(correct["bn"])
    (pair,) = report.images.pairs
    assert pair.difference == crossed_mean(correct["abn"].astype(float) - correct["bn"][:4])
    assert pair.seeds == (0, 1, 2, 3)
    assert report.images.left_out == ["digits with binarynet, abn (fixed): no predictions of seeds 4."]
    body = section((folder / "report.md").read_text(), "Single test images")
    rows = table_rows(body[: body.index("| dataset", body.index("| dataset") + 9)])
    assert [row["n"] for row in rows] == ["5", "4"]
    assert "no predictions of seeds 4" in body
    print_report(report, Console(quiet=True))


def test_runs_on_other_test_images_are_not_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(run: Run) -> Predictions | None:
        found = predict(run)
        if found is None or run.norm == "bn":
            return found
        return Predictions(found.last, found.last_correct, None, None, f"digest {run.seed}")

    monkeypatch.setattr(per_image, "read_predictions", other)
    report = build.build_report(folder)
    assert [c.cell.norm for c in report.images.cells] == ["bn"]
    assert report.images.pairs == []
    assert (
        report.images.left_out[-1] == "digits with binarynet, abn (fixed): its runs were tested on different images."
    )


def test_seeds_of_one_accuracy_have_no_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their networks may differ all the same: that they vary by nothing is no estimate of how much."""
    monkeypatch.setattr(build, "draw", lambda report: {})
    monkeypatch.setattr(per_image, "read_predictions", predict)
    write_report(study(tmp_path, {"bn": [0.7, 0.7], "abn": [0.7, 0.72]}))
    body = section((tmp_path / "report.md").read_text(), "Single test images")
    rows = table_rows(body[: body.index("| dataset", body.index("| dataset") + 9)])
    intervals = [rows[0][name] for name in ("95 % over seeds", "95 % over seeds and images", "95 % interval")]
    assert (rows[0]["norm"], intervals) == ("bn", ["-", "-", "-"])
    assert " to " in rows[1]["95 % over seeds and images"]


def test_that_all_cells_mix_test_images_is_said_of_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(run: Run) -> Predictions | None:
        found = predict(run)
        return found and Predictions(found.last, found.last_correct, None, None, f"digest {run.seed}")

    monkeypatch.setattr(per_image, "read_predictions", other)
    left_out = build.build_report(folder).images.left_out
    assert [line.split(", ")[1] for line in left_out] == [
        *("bn (fixed): its runs were tested on different images.", "abn (fixed): no predictions of seeds 4."),
        "abn (fixed): its runs were tested on different images.",
    ]


def test_without_any_predictions_one_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_image, "read_predictions", lambda run: None)
    report = build.build_report(folder)
    assert len(report.images.left_out) == 1
    assert report.images.left_out[0].startswith("None of these runs has kept its predictions")


def test_the_tables_of_trained_networks_against_what_these_say_of_each_image(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Four networks, asked again; the numbers come from pairs of images, of runs and of one seed."""
    study, test, said = trained_study(tmp_path_factory), load("digits", ".").test, {}
    for run in find_runs(study):
        network, inputs = load_network(run), load_input_format(run)
        said[run.norm, run.seed] = network(inputs.normalize(test.images)).argmax(1).numpy()
    labels = test.labels.numpy()
    report = build.build_report(study)
    assert report.images.left_out == []
    for cell in report.images.cells:
        both = [said[cell.cell.norm, seed] for seed in (0, 1)]
        right = 100.0 * np.array([classes == labels for classes in both])
        assert cell.accuracy.mean == pytest.approx(right.mean())
        assert cell.agreement == np.mean(both[0] == both[1])
        covariances = np.cov(right.T)  # of each image's score with each other's, over the two seeds
        between = covariances[~np.eye(len(labels), dtype=bool)].mean()
        assert cell.split.std**2 == pytest.approx(np.var(right.mean(1), ddof=1))
        assert cell.split.std_of_networks**2 == pytest.approx(max(0, between), abs=1e-9)
        assert cell.split.std_of_test_set**2 == pytest.approx(max(0, cell.split.std**2 - between), abs=1e-9)
    (pair,) = report.images.pairs
    for seed, found in zip((0, 1), pair.mcnemar, strict=True):
        table = confusion_matrix(said["bn", seed] == labels, said["abn", seed] == labels)  # rows: bn wrong, bn right
        assert (found.candidate_alone, found.reference_alone) == (table[0, 1], table[1, 0])
        assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert pair.agreement == np.mean([np.mean(said["bn", seed] == said["abn", seed]) for seed in (0, 1)])
    x = np.array([100.0 * (said["abn", seed] == labels) - 100.0 * (said["bn", seed] == labels) for seed in (0, 1)])
    # The variance of a mean over two seeds and m images is that of two seeds' means, and of images' means beyond what
    # is left: with two seeds, what is left in an image is half its difference less the mean one.
    (a, b), m = x, len(labels)
    seeds = (a.mean() - b.mean()) ** 2 / 4
    images = max(0, np.var((a + b) / 2, ddof=1) - np.var((a - b) / 2, ddof=1)) / m
    error = np.sqrt(seeds + images)
    half = np.hypot(st.t.ppf(0.975, 1) * np.sqrt(seeds), st.t.ppf(0.975, m - 1) * np.sqrt(images))
    found = np.hypot(pair.difference.from_seeds, pair.difference.from_images)
    assert found == pytest.approx(error)
    assert pair.difference.interval == pytest.approx((x.mean() - half, x.mean() + half))

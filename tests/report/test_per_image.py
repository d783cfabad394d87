import numpy as np
import pytest
from rich.console import Console

from abn_exp.report import build
from abn_exp.report.build import print_report, write_report
from abn_exp.report.images import crossed_mean, split_spread
from abn_exp.results import Predictions
from tests.helpers.records import BN, CLEARLY_ABOVE, section, study, table_rows

LABELS = np.random.default_rng(0).integers(0, 10, size=400)


def predict(run):
    """Predictions that are right as often as the run's record says, but for one run that has kept none."""
    if (run.norm, run.seed) == ("abn", 4):
        return None
    rng = np.random.default_rng([run.seed, run.norm == "abn"])
    right = rng.permutation(400) < 400 * run.result.test_acc
    return Predictions(np.where(right, LABELS, (LABELS + 1) % 10), right, None, None, "digest")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "draw", lambda report: {})
    monkeypatch.setattr(build, "read_predictions", predict)
    return study(tmp_path / "images", {"bn": BN, "abn": CLEARLY_ABOVE})


def test_cells_and_pairs_are_gathered_and_what_is_missing_is_said(folder):
    report = write_report(folder)
    bn, abn = report.images.cells
    assert (bn.seeds, abn.seeds) == ((0, 1, 2, 3, 4), (0, 1, 2, 3))
    correct = {
        norm: np.array([predict(run).last_correct for run in cell.runs if predict(run)])
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


def test_runs_on_other_test_images_are_not_compared(folder, monkeypatch):
    def other(run):
        found = predict(run)
        if found is None or run.norm == "bn":
            return found
        return Predictions(found.last, found.last_correct, None, None, f"digest {run.seed}")

    monkeypatch.setattr(build, "read_predictions", other)
    report = build.build_report(folder)
    assert [c.cell.norm for c in report.images.cells] == ["bn"]
    assert report.images.pairs == []
    assert (
        report.images.left_out[-1] == "digits with binarynet, abn (fixed): its runs were tested on different images."
    )


def test_without_any_predictions_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setattr(build, "read_predictions", lambda run: None)
    report = build.build_report(folder)
    assert len(report.images.left_out) == 1
    assert report.images.left_out[0].startswith("None of these runs has kept its predictions")

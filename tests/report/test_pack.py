import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from abn_exp import records
from abn_exp.analysis.evaluate import evaluate
from abn_exp.analysis.trained import find_trained
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.identity import restore_quoted
from abn_exp.records import NETWORKS, RECORDS
from abn_exp.report.build import build_report, write_report
from abn_exp.report.looks import record_look
from abn_exp.report.pack import pack
from abn_exp.report.writers import FIGURES, cells_csv, effects_csv, markdown, runs_csv
from abn_exp.results import find_runs, load_runs, read_metrics
from abn_exp.trained_network import load_network, read_config
from tests.helpers.records import BN, CLEARLY_ABOVE, finish_run, start_run, study
from tests.helpers.runs import REPOSITORY, plan_in, trained_study
from tests.helpers.scripts import run_script

QUOTED = REPOSITORY / "results" / "quoted"
REPORTS = ("report.md", "report.csv", "runs.csv", "report.tex")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = study(tmp_path / "results" / "claims", {"bn": BN, "abn": CLEARLY_ABOVE})
    failed = start_run(made, "abn", 5)
    (failed / "FAILED").write_text("diverged: train/loss is not finite")
    (made / "command.txt").write_text("python train.py -m norm=bn,abn seeds=five\n")
    return made


def test_a_packed_study_has_the_same_runs_and_the_same_report(folder: Path, no_figures: None) -> None:
    write_report(folder)
    done = pack(folder)
    assert (done.folder, done.added, done.present, done.left_out) == (folder.parent / "quoted" / "claims", 11, 0, [])
    assert {path.name for path in done.folder.iterdir()} == {*REPORTS, "report.html", RECORDS, "figures"}
    for name in REPORTS:
        assert (done.folder / name).read_bytes() == (folder / name).read_bytes(), name
    assert load_runs(done.folder) == load_runs(folder)
    for packed, run in zip(find_runs(done.folder), find_runs(folder), strict=True):
        assert packed.directory.relative_to(done.folder) == run.directory.relative_to(folder)
        assert (packed.status, packed.reason) == (run.status, run.reason)
        assert read_config(packed.directory) == read_config(run.directory)
        assert read_metrics(packed.directory) == read_metrics(run.directory)


def test_later_runs_are_added_and_another_record_of_the_same_run_is_refused(folder: Path, no_figures: None) -> None:
    target = pack(folder).folder
    before = (target / RECORDS).read_bytes()
    assert (pack(folder).added, (target / RECORDS).read_bytes()) == (0, before)
    finish_run(folder, "bn", 7, 0.71)
    start_run(folder, "bn", 8)
    (folder / "command.txt").write_text("python train.py -m norm=bn,abn seeds=ten\n")
    done = pack(folder)
    assert (done.added, done.present) == (1, 11)
    assert len(done.left_out) == 1
    assert done.left_out[0].endswith("seed-8 is left out: it is not finished.")
    assert "seeds=five\npython train.py -m norm=bn,abn seeds=ten\n" in (target / "report.md").read_text()
    before = (target / RECORDS).read_bytes()
    shutil.rmtree(folder / "digits" / "binarynet" / "bn" / "fixed" / "seed-7")
    finish_run(folder, "bn", 7, 0.72)
    with pytest.raises(ValueError, match=r"holds digits/binarynet/bn/fixed/seed-7 with another result.json than"):
        pack(folder)
    assert (target / RECORDS).read_bytes() == before


def test_a_primary_comparison_is_not_judged_in_the_archive_before_its_runs_have_ended(
    tmp_path: Path, no_figures: None
) -> None:
    primary = {"norm": "abn", "reference": "bn", "datasets": None, "models": None, "statistic": "mean"}
    config = yaml.safe_dump({"delta": 0.5, "primary": primary})
    folder = study(tmp_path / "results" / "claims", {"bn": BN, "abn": CLEARLY_ABOVE[:3]}, config=config)
    for seed in (3, 4):
        start_run(folder, "abn", seed, config=config)
    target = pack(folder).folder
    for place in (folder, target):
        (answer,) = build_report(place).answer()
        assert "It is not judged yet: 2 of its runs have not come to an end." in answer
    for seed in (3, 4):  # "remove the folders of runs that are not to be trained"
        shutil.rmtree(next(folder.glob(f"digits/binarynet/abn/fixed/seed-{seed}")))
    pack(folder)
    assert build_report(target).answer() == build_report(folder).answer()
    shutil.rmtree(folder / "digits" / "binarynet" / "abn")
    study(folder, {"abn": CLEARLY_ABOVE}, config=config)
    assert pack(folder).added == 2
    assert "better" in build_report(target).answer()[0]


def test_looks_of_a_packed_study_are_known_where_it_goes_on(tmp_path: Path, no_figures: None) -> None:
    """On another machine, which has the archive alone."""
    folder = tmp_path / "results" / "runs"
    plans = {norm: plan_in(tmp_path / "results", f"norm={norm}") for norm in ("bn", "abn")}
    config = yaml.safe_dump(plans["bn"].config.model_dump()), yaml.safe_dump(plans["abn"].config.model_dump())
    for text, (norm, plan) in zip(config, plans.items(), strict=True):
        finish_run(folder, norm, 0, 0.7, variant=plan.variant, config=text)
        finish_run(folder, norm, 1, 0.71, variant=plan.variant, config=text)
    write_report(folder)
    key = f"digits/binarynet/abn/{plans['abn'].variant}"
    assert json.loads((folder / "looks.json").read_text()) == {key: [2]}
    archive = pack(folder).folder / RECORDS
    shutil.rmtree(folder)
    assert restore_quoted(plans["bn"]) == archive
    assert json.loads((folder / "looks.json").read_text()) == {key: [2]}
    (folder / "looks.json").write_text(json.dumps({key: [3], "other": [5]}))
    pack(folder)
    assert json.loads(records.read_records(archive)["looks.json"]) == {key: [2, 3], "other": [5]}
    (folder / "looks.json").write_text(json.dumps({key: [4]}))
    shutil.rmtree(plans["bn"].directory)
    assert restore_quoted(plans["bn"]) == archive
    assert json.loads((folder / "looks.json").read_text()) == {key: [2, 3, 4], "other": [5]}
    (folder / "looks.json").write_text("[]")
    with pytest.raises(DamagedFile, match=r"looks\.json is damaged"):
        pack(folder)


def test_what_is_packed_is_not_packed_again(folder: Path, no_figures: None) -> None:
    with pytest.raises(ValueError, match="is packed already; give results/NAME"):
        pack(pack(folder).folder)


def test_damaged_and_missing_runs_are_refused(folder: Path, no_figures: None, tmp_path: Path) -> None:
    directory = folder / "digits" / "binarynet" / "bn" / "fixed" / "seed-0"
    record = json.loads((directory / "result.json").read_text())
    (directory / "result.json").write_text(json.dumps(record | {"test_acc": 0.9}))
    with pytest.raises(ValueError, match=r"result.json is damaged: .*; nothing was packed"):
        pack(folder)
    assert not (folder.parent / "quoted").exists()
    with pytest.raises(ValueError, match="is not the folder of one study"):
        pack(folder.parent)
    with pytest.raises(ValueError, match="no finished runs below"):
        pack(tmp_path / "nothing")


def test_tables_and_figures_of_analyses_are_copied_without_pdf(folder: Path, no_figures: None) -> None:
    analysis = folder / "analysis" / "cam"
    analysis.mkdir(parents=True)
    for name in ("images.csv", "maps.png", "maps.pdf", "summary.md", "histograms.csv"):
        (analysis / name).write_text(name)
    target = pack(folder).folder
    copied = {path.name for path in (target / "analysis" / "cam").iterdir()}
    assert copied == {"images.csv", "maps.png", "summary.md"}


def test_a_run_in_an_archive_has_no_weights(folder: Path, no_figures: None) -> None:
    packed = find_runs(pack(folder).folder)[0]
    with pytest.raises(FileNotFoundError):
        load_network(packed.directory)


def test_networks_are_packed_and_predict_what_they_did(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, no_figures: None
) -> None:
    folder = shutil.copytree(trained_study(tmp_path_factory), tmp_path / "results" / "runs")
    trained = find_runs(folder)
    checkpoints = trained[0].directory / "checkpoints"
    shutil.move(checkpoints, tmp_path / "elsewhere")
    done = pack(folder, networks=True)
    assert done.left_out == [f"Without a network, as their weights are not here: {trained[0].directory}."]
    shutil.move(tmp_path / "elsewhere", checkpoints)
    records = (done.folder / RECORDS).read_bytes()
    assert pack(folder, networks=True).left_out == []
    assert (done.folder / RECORDS).read_bytes() == records
    networks = (done.folder / NETWORKS).read_bytes()
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for run, packed in zip(trained, find_runs(done.folder), strict=True):
        assert not packed.directory.exists()
        assert torch.equal(load_network(run)(images), load_network(packed)(images))
        with pytest.raises(FileNotFoundError):
            load_network(packed, "best")
    binary = sum(run.result.parameters["binary"] for run in trained if run.result is not None)
    weights = sum((run.directory / "checkpoints" / "last.ckpt").stat().st_size for run in trained)
    assert binary / 8 < len(networks) < weights / 5

    # A clone that has the archive alone: the study's command restores its runs, and they can be analysed.
    shutil.rmtree(folder)
    for packed in find_runs(done.folder):
        plan = plan_in(folder.parent, f"norm={packed.norm}", f"seed={packed.seed}")
        assert restore_quoted(plan) == done.folder / RECORDS
    restored = find_trained([folder])
    assert [run.result for run in restored] == [run.result for run in trained]
    for run in restored:
        assert run.result is not None
        assert evaluate(run.directory).accuracy == pytest.approx(run.result.test_acc, abs=1e-6)
    with pytest.raises(ConfigError, match=r"has no checkpoints/last.ckpt; give the folder of a run"):
        plan_in(tmp_path / "second", f"init_from={restored[0].directory}")
    pack(folder, networks=True)
    assert (done.folder / NETWORKS).read_bytes() == networks
    shutil.rmtree(done.folder)
    pack(folder, networks=True)
    assert (done.folder / NETWORKS).read_bytes() == networks


def test_networks_go_with_their_records_and_are_no_more_than_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    folder = shutil.copytree(trained_study(tmp_path_factory), tmp_path / "results" / "runs")
    target = pack(folder, networks=True).folder
    (target / RECORDS).unlink()  # "remove the archive to replace all of it"
    pack(folder)
    assert not (target / NETWORKS).exists()
    monkeypatch.setitem(records.MAX_BYTES, NETWORKS, 1000)
    with pytest.raises(ValueError, match="which is more than is read again"):
        pack(folder, networks=True)
    assert not (target / NETWORKS).exists()
    monkeypatch.undo()
    pack(folder, networks=True)
    (target / NETWORKS).write_bytes(b"")
    shutil.rmtree(folder)
    assert restore_quoted(plan_in(folder.parent, "norm=bn", "seed=0")) == target / RECORDS
    assert [run.status for run in find_runs(folder)] == ["finished"]


def test_damaged_weights_are_not_packed(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, no_figures: None
) -> None:
    folder = shutil.copytree(trained_study(tmp_path_factory), tmp_path / "results" / "runs")
    (path := find_runs(folder)[-1].directory / "checkpoints" / "last.ckpt").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"last.ckpt is damaged"):
        pack(folder, networks=True)
    assert not (folder.parent / "quoted").exists()


def test_the_script_packs_and_refuses_in_a_sentence(
    folder: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argument: object) -> tuple[object, Any]:
        return run_script(monkeypatch, "runs", "--pack", argument), capsys.readouterr()

    code, said = run(folder)
    assert (code, said.out) == (0, f"{folder.parent / 'quoted' / 'claims'}: 11 runs added, 0 were there.\n")
    code, said = run(folder / "nothing")
    assert (code, said.err.count("\n")) == (1, 1)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in QUOTED.glob(f"*/{RECORDS}")))
def test_quoted_reports_are_what_their_records_say(name: str) -> None:
    report = build_report(QUOTED / name)
    if report.plan is None:  # as write_report says of looks without a plan; in a packed folder it writes nothing
        report = replace(report, unplanned=record_look(QUOTED / name, report.comparisons))
    drawn = [figure for figure in FIGURES if (QUOTED / name / "figures" / f"{figure}.png").is_file()]
    written = {"report.md": markdown(report, drawn), "report.csv": cells_csv(report)}
    written |= {"runs.csv": runs_csv(report), "effects.csv": effects_csv(report)}
    for file, text in written.items():
        path = QUOTED / name / file
        assert (path.read_text(encoding="utf-8") if path.is_file() else "") == text, f"{name}/{file}"

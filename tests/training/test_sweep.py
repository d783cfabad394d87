"""A multirun as a user would start it, stop it, break it and start it again."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan, plan_run
from abn_exp.results import Run, find_runs, has_begun, read_metrics, read_result, write_result
from abn_exp.training.sweep import SweepCallback, expand
from abn_exp.training.workers import Job, Outcome
from tests.helpers.cli import FORKED_WORKERS, NO_FIGURES, Cli, Started, until
from tests.helpers.records import finish_run
from tests.helpers.runs import REPOSITORY, TINY, once

OPTUNA = "hydra.sweeper._target_=hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
SIX = ["seeds=three", "norm=bn,abn"]


def sweep(cli: Cli, folder: Path, *arguments: str, figures: bool = False, new_group: bool = False) -> Started:
    """Start train.py in a folder of its own; paths are relative, so that two such commands are the same."""
    options = [argument for argument in arguments if argument == "-m"]
    overrides = [argument for argument in arguments if argument != "-m"]
    inject = FORKED_WORKERS + ("" if figures else NO_FIGURES)
    return cli.start(*options, "device=cpu", *TINY, *overrides, inject=inject, cwd=folder, new_group=new_group)


def wait_for(condition: Callable[[], object]) -> None:
    assert until(condition, 300)


def killed(cli: Cli, started: Started) -> None:
    os.kill(started.pid, signal.SIGKILL)
    assert cli.wait(started).code == -signal.SIGKILL


def runs_of(folder: Path) -> dict[tuple[str, int], Run]:
    return {(run.norm, run.seed): run for run in find_runs(folder / "results")}


def scores(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    results = {key: run.result for key, run in runs_of(folder).items()}
    return {key: (result.test_acc, result.test_loss) for key, result in results.items() if result is not None}


def report(folder: Path) -> tuple[str, str]:
    """What was found, without how it was run and how long it took."""
    name = folder / "results" / "runs"
    return (name / "report.md").read_text().split("## How it was run")[0], (name / "report.csv").read_text()


@pytest.fixture(scope="session")
def undisturbed(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        done = cli.wait(sweep(cli, folder, "-m", *SIX, figures=True))
        assert done.code == 0, done.err
        (folder / "stdout").write_text(done.out)

    return once(tmp_path_factory, "undisturbed-sweep", make)


def test_a_sweep_runs_every_cell_with_every_seed(undisturbed: Path) -> None:
    assert scores(undisturbed).keys() == {(norm, seed) for norm in ("bn", "abn") for seed in (0, 1, 2)}
    assert "| bn | 3 |" in report(undisturbed)[0]
    out = (undisturbed / "stdout").read_text()
    assert "6 runs, 0 of them finished, 6 to do" in out
    lines = out.splitlines()
    assert max(len(line) for line in lines if "results/" not in line) <= 80
    for label in ("bn s0", "bn s1", "bn s2", "abn s0", "abn s1", "abn s2"):
        (line,) = [line for line in lines if line.startswith(f"[{label}] test ")]
        assert re.fullmatch(r"\[.*\] test [\d.]+ %, validation [\d.]+ %, 2 epochs in \d+:\d\d:\d\d", line)


def test_a_second_time_nothing_is_trained(cli: Cli, undisturbed: Path) -> None:
    records = [path for path in undisturbed.rglob("*") if path.name in ("result.json", "last.ckpt", "metrics.jsonl")]
    assert len(records) == 18
    before = [path.stat().st_mtime_ns for path in records]
    files = [undisturbed / "results" / "runs" / f for f in ("report.md", "report.csv", "runs.csv", "report.tex")]
    texts = [path.read_bytes() for path in files]
    done = cli.wait(sweep(cli, undisturbed, "-m", *SIX))
    assert done.code == 0
    assert "6 runs, 6 of them finished, 0 to do" in done.out
    assert "seed" not in done.out.split("test accuracy")[0]  # no title for each run
    assert [path.stat().st_mtime_ns for path in records] == before
    assert [path.read_bytes() for path in files] == texts


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(cli: Cli, undisturbed: Path, tmp_path: Path) -> None:
    """Killed in its third run, without -m; gone on with two at a time."""

    def third_has_begun() -> bool:
        found = find_runs(tmp_path / "results")
        others = [run for run in found if run.result is None]
        return 2 <= len(found) - len(others) < 6 and any(read_metrics(run.directory) for run in others)

    started = sweep(cli, tmp_path, *SIX)
    wait_for(third_has_begun)
    killed(cli, started)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert 2 <= len(finished) < 6
    assert not (tmp_path / "results" / "runs" / "report.md").exists()
    done = cli.wait(sweep(cli, tmp_path, *SIX, "seeds_at_once=2"))
    assert done.code == 0, done.err
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())
    assert scores(tmp_path) == scores(undisturbed)
    assert report(tmp_path) == report(undisturbed)


def test_one_failure_stops_no_other_run(cli: Cli, tmp_path: Path, undisturbed: Path) -> None:
    directory = runs_of(undisturbed)["abn", 1].directory.relative_to(undisturbed)
    (tmp_path / directory).mkdir(parents=True)
    (tmp_path / directory / "checkpoints").touch()  # where a folder belongs
    done = cli.wait(sweep(cli, tmp_path, "seeds=three", "norm=abn"))
    assert done.code == 1
    assert "Traceback" not in done.err
    assert scores(tmp_path) == {
        key: score for key, score in scores(undisturbed).items() if key in (("abn", 0), ("abn", 2))
    }
    (line,) = [line for line in done.out.splitlines() if line.startswith("FAILED")]
    assert str(directory) in line
    assert "checkpoints" in line.split(":", 1)[1]
    assert "| abn | 2/3 |" in report(tmp_path)[0]


def test_a_run_that_dies_is_named_and_the_others_finish(cli: Cli, tmp_path: Path) -> None:
    """SIGSEGV to the worker, as of a library that writes beyond its memory; then SIGTERM to the command."""
    words = ["-m", "recipe.epochs=5000,1", "norm=abn"]

    def dying_has_begun() -> bool:
        return any(len(read_metrics(path.parent)) >= 1 for path in tmp_path.rglob("*epochs-5000*/seed-0/RUNNING"))

    started = sweep(cli, tmp_path, *words)
    wait_for(dying_has_begun)
    (running,) = tmp_path.rglob("RUNNING")
    os.kill(int(running.read_text().split()[1]), signal.SIGSEGV)
    done = cli.wait(started)
    assert done.code == 1
    assert "Traceback" not in done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("FAILED")]
    assert re.search(r"epochs-5000/seed-0: killed by SIGSEGV, in epoch \d+ of 5000$", line)
    assert [run.status for run in find_runs(tmp_path)] == ["finished", "failed"]

    started = sweep(cli, tmp_path, *words)
    wait_for(dying_has_begun)
    os.kill(started.pid, signal.SIGTERM)
    done = cli.wait(started)
    assert done.code == 143
    assert "Traceback" not in done.err
    assert "1 of 2 runs are finished; stopped by SIGTERM; the same command goes on" in done.err
    assert "] the last attempt failed: killed by SIGSEGV, in epoch" in done.out
    assert re.search(r"\] stopped by SIGTERM in epoch \d+ of 5000; the same command goes on from", done.out)


def test_ctrl_c_stops_a_sweep_of_several_runs_at_once(cli: Cli, tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process of the command."""
    words = ["-m", "seed=0,1,2", "seeds_at_once=2", "recipe.epochs=5000"]
    started = sweep(cli, tmp_path, *words, new_group=True)
    wait_for(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    os.killpg(started.pid, signal.SIGINT)
    done = cli.wait(started)
    assert done.code == 130
    assert "Traceback" not in done.out + done.err
    assert "0 of 3 runs are finished; stopped by SIGINT; the same command goes on" in done.err
    assert len(re.findall(r"^\[s\d\] stopped by SIGTERM in epoch", done.out, re.MULTILINE)) == 2
    assert [run.status for run in find_runs(tmp_path)] == ["unfinished"] * 3
    assert [has_begun(run.directory) for run in find_runs(tmp_path)] == [True, True, False]
    for run in find_runs(tmp_path)[:2]:
        torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
        read_metrics(run.directory)
        assert not (run.directory / "RUNNING").exists()


def composed(*overrides: str) -> Any:
    """The configuration from which Hydra starts a multirun."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN, from_shell=False)


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        yield


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe.epochs=1,0"], "error: recipe.epochs=0 is not allowed: it should be greater than 0."),
        (["seed=0,-1"], "error: seed=-1 is not allowed: it should be greater than or equal to 0."),
        (["devices=1,2"], "error: devices=1 is the only choice in a multirun"),
        ([OPTUNA, "seed=0,1"], "error: hydra/sweeper is OptunaSweeper, which takes the best run for the best values"),
        (
            [OPTUNA, "seeds=three"],
            "seed is among what it searches: it would find a lucky seed; scripts/search.py takes",
        ),
        (["seeds_at_once=2", "hydra/launcher=basic"], "error: seeds_at_once is for hydra/launcher=workers"),
        (["seeds=until_decided", "norm=bn,abn", "looks=[2,3]", "seed=7"], "has no run; the looks end at seed 2:"),
        (["seed=range(3,3)"], "error: This command has no run: choose other seeds."),
        (["study=trained", "looks=5"], "error: looks=5 is not allowed: it should be a list of numbers of seeds"),
        (["study=trained", "looks=[2.5]"], "error: looks=[2.5] is not allowed: it should be a list of"),
        (["study=trained", "seed=abc"], "error: seed=abc is not allowed: it should be a whole number"),
        (["dry_run=true", "dataset=folder", "dataset.path=/nowhere"], "error: /nowhere has no folder 'train'"),
    ],
)
def test_one_wrong_value_refuses_the_whole_sweep(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    """By SystemExit, the one exception of a callback that ends a multirun before its first run."""
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        SweepCallback().on_multirun_start(composed(f"results_dir={tmp_path}/results", *overrides))
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("hydra")
def test_two_commands_that_are_one_run_count_once(tmp_path: Path) -> None:
    """The published start is that of one network; for any other the option has no effect."""
    callback, overrides = SweepCallback(), [f"results_dir={tmp_path}", "seed=0,1", "recipe.init=torch,authors"]
    callback.on_multirun_start(composed(*overrides, "model=binarynet"))
    assert len(callback.plans) == 2
    callback.on_multirun_start(composed(*overrides, "model=resnet18_paper"))
    assert len(callback.plans) == 4


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("words", "count"), [(["seed=0,1"], 2), (["norm=bn,abn", "seeds=until_decided", "looks=[2,3]"], 6)]
)
@pytest.mark.parametrize(("fault", "code"), [(None, 0), (RuntimeError("no such kernel"), 1)])
def test_a_dry_run_trains_and_plans_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Exception | None,
    code: int,
    words: list[str],
    count: int,
) -> None:
    """Not even where it fails: Hydra would go on after any exception but SystemExit."""

    def dry_run(plans: list[RunPlan]) -> Iterator[str]:
        yield f"{len(plans)} runs"
        if fault is not None:
            raise fault

    monkeypatch.setattr("abn_exp.training.estimate.dry_run", dry_run)
    with pytest.raises(SystemExit, match=str(code)):
        SweepCallback().on_multirun_start(composed(f"results_dir={tmp_path}/results", "dry_run=true", *words))
    assert f"{count} runs" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("hydra")
def test_the_seeds_are_those_named_last() -> None:
    def expanded(*overrides: str) -> list[tuple[str, int]]:
        return [(plan.choices["norm"], plan.config.seed) for plan in expand(composed(*overrides)).values()]

    assert expanded("seeds=three") == [("abn", 0), ("abn", 1), ("abn", 2)]
    assert expanded("seeds=three", "seed=7") == [("abn", 7)]
    assert expanded("seed=3,4", "seeds=five") == [("abn", 3), ("abn", 4)]
    assert expanded("+hydra.sweeper.params.seed='5,6'") == [("abn", 5), ("abn", 6)]
    assert expanded("study=trained", "norm=abn", "seeds=one") == [("abn", 0)]
    assert len(expanded("study=trained", "seeds=three")) == 6
    assert {norm for norm, _ in expanded("norm=glob(abn*,exclude=abn_*)", "seeds=one")} == {"abn"}
    assert set(expanded("seeds=five", "norm=bn,abn")) == {(norm, seed) for norm in ("bn", "abn") for seed in range(5)}


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("more", [[], ["name=run-${seed}", "recipe.split_seed=${seed}"], ["model.width=0.125,0.25"]])
def test_a_cell_is_composed_once_and_its_runs_are_those_composed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    composing = Mock(side_effect=compose)
    monkeypatch.setattr("abn_exp.training.sweep.compose", composing)
    found = expand(composed(f"results_dir={tmp_path}", "seed=5,0,7", "norm=bn,abn", *more))
    assert composing.call_count == len(found) / 3
    for overrides, plan in found.items():
        cfg = compose("config", list(overrides), return_hydra_config=True)
        alone = plan_run(cfg, dict(cfg.hydra.runtime.choices))
        assert plan == alone
        assert plan.config_hash == alone.config_hash
    with pytest.raises(ConfigError, match="seed=-1 is not allowed"):
        expand(composed(f"results_dir={tmp_path}", "seed=0,-1", *more))


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("left", ["nothing", "another's result"])
def test_a_run_without_a_result_of_its_own_is_told(
    tmp_path: Path, undisturbed: Path, left: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a worker was killed, or where a folder holds what another configuration found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("abn_exp.report.figures.save", lambda *_: None)
    shutil.copytree(undisturbed / "results", "results", ignore=shutil.ignore_patterns("checkpoints"))
    config = composed("device=cpu", "wandb=disabled", *TINY, *SIX)
    callback = SweepCallback()
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)
    directory = runs_of(tmp_path)["bn", 2].directory
    if left == "nothing":
        shutil.rmtree(directory)
    else:
        callback.plans = [
            replace(plan, config=plan.config.model_copy(update={"precision": "bf16"})) for plan in callback.plans
        ]
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="1"):
        callback.on_multirun_end(config)
    assert ("NOT BEGUN" if left == "nothing" else "REFUSED") in caplog.text


def finish(plan: RunPlan, elsewhere: Path, device: str = "cpu") -> None:
    """Write a record into a run's folder, as if it had been trained."""
    result = read_result(finish_run(elsewhere, plan.choices["norm"], plan.config.seed, 0.5, device=device))
    assert result is not None
    write_result(plan.directory, result)


@pytest.mark.usefixtures("hydra")
def test_a_run_that_was_refused_is_known_to_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal removes its folder. Without it the primary comparison would be judged by the other seeds."""
    words = ["norm=bn,abn", "seeds=three", "primary={norm:abn}"]
    config = composed(f"results_dir={tmp_path}/results", "wandb=disabled", *TINY, *words)
    callback = SweepCallback()
    callback.on_multirun_start(config)
    for plan in callback.plans:
        if plan.config.seed == 2:
            shutil.rmtree(plan.directory)
        else:
            finish(plan, tmp_path / "other")
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="1"):
        callback.on_multirun_end(config)
    assert caplog.text.count("NOT BEGUN") == 2
    assert "It is not judged yet: 2 of its runs have" in (tmp_path / "results" / "runs" / "report.md").read_text()


@pytest.mark.usefixtures("hydra")
def test_a_look_that_cannot_be_taken_ends_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["norm=bn,abn", "seeds=until_decided", "looks=[2,3]"]
    config = composed(f"results_dir={tmp_path}/results", "wandb=disabled", *TINY, *words)
    callback = SweepCallback()
    callback.on_multirun_start(config)
    for plan, device in zip(callback.plans[:4], ["cpu", "cpu", "NVIDIA H200", "NVIDIA H200"], strict=True):
        finish(plan, tmp_path / "other", device)
    assert callback.decided(1)  # nothing more is run
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="1"):
        callback.on_multirun_end(config)
    assert re.findall(r"NO LOOK at 2 seeds: .*", caplog.text) == [
        "NO LOOK at 2 seeds: The comparison in plan.json was run on several kinds of device, which are not averaged."
    ]
    assert "NOT BEGUN" not in caplog.text
    assert (tmp_path / "results" / "runs" / "report.md").is_file()


def another_launchers(*todo: str) -> Any:
    """The sweeper with a launcher that is not this project's; `todo` are the runs that are not finished."""
    sweeper = import_module("hydra_plugins.abn_exp_plugins").StudySweeper()
    sweeper.config, sweeper.launcher = OmegaConf.create({"looks": [1, 2, 3]}), Mock()
    sweeper.callbacks = [Mock(to_do=lambda job: job[0] in todo, decided=lambda looked: looked == 3)]
    return sweeper


def test_finished_runs_are_not_given_to_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would begin a job for each; and a batch without any, with which submitit fails, is passed over."""
    batches = [[["a"], ["b"]], [["c"]], [["d"], ["e"]]]
    monkeypatch.setattr("abn_exp.training.sweep.split_into_batches", lambda *_: batches)
    sweeper = another_launchers("a", "e")
    sweeper.overrides = sweeper.split_arguments([], None)
    given = []
    while not sweeper.is_done():
        given.append(sweeper.get_job_batch())
    assert given == [[["a"]], [["e"]]]


def test_a_job_that_ends_another_launcher_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of SLURM that was killed; what Hydra itself refuses is an error of the command."""
    error: Exception = RuntimeError("job 3 has no result")

    def fail(*_: Any) -> None:
        raise error

    sweeper = another_launchers()
    monkeypatch.setattr(type(sweeper).__base__, "sweep", fail)
    assert sweeper.sweep([]) == []
    sweeper.callbacks[0].cut_short.assert_called_once_with(0, "RuntimeError: job 3 has no result")
    error = HydraException("no such key")
    with pytest.raises(HydraException):
        sweeper.sweep([])


@pytest.mark.usefixtures("hydra")
def test_a_sweep_that_is_cut_short_judges_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Jobs that were submitted may go on, and a report of now would be a look."""
    words = ["norm=bn,abn", "seeds=until_decided", "looks=[2,3]"]
    config = composed(f"results_dir={tmp_path}/results", "wandb=disabled", *TINY, *words)
    callback = SweepCallback()
    callback.on_multirun_start(config)
    plan = callback.plans[0]
    finish(plan, tmp_path / "other")
    callback.cut_short(1, "RuntimeError: job 3 has no result")
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="1"):
        callback.on_multirun_end(config)
    assert "job 3 has no result; jobs that were submitted may go on" in caplog.text
    assert caplog.text.count("NOT BEGUN") == 3  # of the first look
    assert {path.name for path in plan.study.iterdir()} >= {"report.html", "plan.json"}
    assert not (plan.study / "looks.json").exists()
    assert not (plan.study / "report.md").exists()


@pytest.mark.usefixtures("hydra")
def test_the_command_of_a_single_run_of_a_planned_study_is_accepted(tmp_path: Path) -> None:
    """It stands above each configuration; the study's looks are not typed in it."""
    callback, folder = SweepCallback(), f"results_dir={tmp_path}/results"
    callback.on_multirun_start(composed(folder, "study=trained", "wandb=disabled"))
    directory = callback.plans[3].directory
    typed = (directory / "config.yaml").read_text().splitlines()[0].removeprefix("# python train.py ")
    assert "seeds=one" in typed
    alone = SweepCallback()
    alone.on_multirun_start(composed(*shlex.split(typed)))
    assert [plan.directory for plan in alone.plans] == [directory]


@pytest.mark.usefixtures("hydra")
def test_runs_that_are_forced_are_not_counted_as_finished(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed / "results", "results")
    for words, counts in (
        (["force=true"], "6 runs, 0 of them finished, 6 to do"),
        ([], "6 runs, 6 of them finished"),
    ):
        with caplog.at_level(logging.INFO):
            SweepCallback().on_multirun_start(composed("device=cpu", "wandb=disabled", *TINY, *SIX, *words))
        assert counts in caplog.text


@pytest.mark.usefixtures("hydra")
def test_a_forced_run_that_was_refused_is_told_though_its_old_result_is_there(
    tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed / "results", "results")
    callback = SweepCallback()
    callback.on_multirun_start(composed("device=cpu", "wandb=disabled", *TINY, *SIX, "force=true"))
    first, *others = callback.plans
    for plan in others:  # which another launcher's jobs have trained
        os.utime(plan.directory / "result.json")
    assert callback._failed() == [f"NOT REPLACED {first.directory}: no reason recorded"]
    callback.errors[first.directory] = "there is no such data"
    assert callback._failed() == [f"NOT REPLACED {first.directory}: there is no such data"]


@pytest.mark.usefixtures("hydra")
def test_only_what_is_not_finished_is_handed_to_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each run once, with what tells it from the others; a run that leaves nothing is named with the reason."""
    words = ["norm=bn,abn", "seed=0,1", "threads=1,2", "seeds_at_once=3"]  # threads are in no run's name
    config = composed(f"results_dir={tmp_path}/results", "wandb=disabled", *TINY, *words)
    callback = SweepCallback()
    callback.on_multirun_start(config)
    assert sorted(run.seed for run in find_runs(tmp_path)) == [0, 0, 1, 1]
    finished, result = callback.plans[0].directory, read_result(finish_run(tmp_path / "elsewhere", "bn", 0, 0.9))
    handed: list[Job] = []

    def train(jobs: list[Job], count: int, job_logging: Any) -> Generator[tuple[Job, Outcome]]:
        handed.extend(jobs)
        assert count == 3
        for job in jobs:
            shutil.rmtree(job.plan.directory)
            yield job, Outcome(error="there is no such data")

    monkeypatch.setattr(
        "abn_exp.training.sweep.finished_result", lambda plan: result if plan.directory == finished else None
    )
    monkeypatch.setattr("abn_exp.training.sweep.train", train)
    jobs = callback.launch(config, [list(overrides) for overrides in callback._planned])
    assert [job.return_value for job in jobs] == [0.8, 0.8, None, None, None, None, None, None]
    assert [job.label for job in handed] == ["bn threads=1 s1", "abn threads=1 s0", "abn threads=1 s1"]
    assert all("norm=" in job.command and "python train.py" in job.command for job in handed)
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="1"):
        callback.on_multirun_end(config)
    assert len(set(re.findall(r"NOT BEGUN .*(?=: there is no such data)", caplog.text))) == 3


def test_a_run_s_configuration_is_let_go() -> None:
    job = JobReturn(cfg=OmegaConf.create({"a": 1}), hydra_cfg=OmegaConf.create({"b": 2}), overrides=["seed=1"])
    SweepCallback().on_job_end(OmegaConf.create(), job)
    assert (job.cfg, job.hydra_cfg, job.overrides) == (None, None, ["seed=1"])


@pytest.mark.slow
def test_seeds_until_decided_end_the_same_after_a_kill(cli: Cli, undisturbed: Path, tmp_path: Path) -> None:
    """Two looks at the cells of the undisturbed sweep; killed after the first, typed again."""
    command = ["norm=bn,abn", "seeds=until_decided", "looks=[2,3]", "delta=0.01"]
    plan = tmp_path / "results" / "runs" / "plan.json"

    def entries() -> list[dict[str, Any]]:
        return list(json.loads(plan.read_text())["entries"]) if plan.is_file() else []

    started = sweep(cli, tmp_path, *command)
    wait_for(lambda: entries() and len(runs_of(tmp_path)) > 4)
    killed(cli, started)
    (first,) = entries()
    assert (first["seeds"], first["verdict"]) == (2, "undecided")
    done = cli.wait(sweep(cli, tmp_path, *command))
    assert done.code == 0, done.err
    assert scores(tmp_path) == scores(undisturbed)
    assert entries()[0] == first
    assert [entry["seeds"] for entry in entries()] == [2, 3]
    text = (tmp_path / "results" / "runs" / "report.md").read_text()
    assert "**Primary comparison: abn against bn (look 2 of 2, at 3 seeds). On digits with binarynet" in text
    for words, sentence in [
        ((*command[:2], "looks=[2,4]", "delta=0.01"), "which has looks 2, 3, not 2, 4"),
        (("norm=abn", "seed=3"), "its looks have not asked for seed 3"),
        (("norm=abn", "looks=[2,3]", "name=other"), "this command is one run"),
        (("norm=bn,abn", "seed=0,1", "-m", "spending=pocock", "name=other"), "spending= is for seeds=until_decided"),
    ]:
        refused = cli.wait(sweep(cli, tmp_path, *words))
        assert refused.code == 1
        assert sentence in refused.err
        assert len(refused.err.splitlines()) == 1
    typed = (runs_of(tmp_path)["abn", 2].directory / "config.yaml").read_text().splitlines()[0]
    alone = shlex.split(typed.removeprefix("# python train.py "))
    again = cli.wait(sweep(cli, tmp_path, *alone))  # the run alone, as its record says
    assert again.code == 0, again.err
    assert "finished before" in again.out

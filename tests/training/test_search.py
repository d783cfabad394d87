"""A search over hyper-parameters: judged by validation accuracy over seeds, with the same budget for each norm."""

import csv
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from abn_exp.errors import ConfigError
from abn_exp.results import find_runs, load_runs
from abn_exp.training import search as module
from abn_exp.training.search import Search, read_space
from tests.helpers.runs import REPOSITORY, TINY
from tests.helpers.scripts import run_script

LR = "recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))"
WORDS = [*TINY, "recipe.epochs=1", "dataset.train_images=100", "norm=bn,abn", "seed=1000,1001", LR]
SILENT = {"say": lambda line: None}


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        yield


def search(folder: Path, *words: str) -> Search:
    return Search(read_space([*WORDS, f"results_dir={folder}", *words]))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search of two trials of each norm that was stopped in the middle of its last and goes on."""
    folder = tmp_path_factory.mktemp("searched")
    stopped, train, calls = search(folder), module.run, []

    def stop_at_the_seventh_run(*arguments: Any, **options: Any) -> object:
        calls.append(arguments)
        assert options == {"patience": -1}  # another process may train the same run: wait for it
        if len(calls) == 7:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", stop_at_the_seventh_run)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(2, **SILENT)
    again = search(folder)
    again.run(2, **SILENT)
    return again


def test_ranges_are_those_of_hydra() -> None:
    space = read_space(
        [
            *("norm=bn", "seed=7", "recipe.epochs=3", LR, "recipe.batch_size=choice(32,64)"),
            *(
                "model.width=int(interval(1,3))",
                "+recipe.optimizer.eps=1e-8,1e-6",
                "recipe.schedule.warmup_epochs=range(0,5,2)",
            ),
        ]
    )
    assert (space.norms, space.seeds, space.fixed) == (["bn"], [7], ["recipe.epochs=3"])
    assert space.options == {
        "recipe.optimizer.lr": FloatDistribution(1e-4, 0.1, log=True),
        "recipe.batch_size": CategoricalDistribution(["32", "64"]),
        "model.width": IntDistribution(1, 3),
        "+recipe.optimizer.eps": CategoricalDistribution(["1e-08", "1e-06"]),
        "recipe.schedule.warmup_epochs": IntDistribution(0, 4, step=2),
    }
    assert read_space([LR]).seeds == [1000, 1001, 1002]


def test_each_norm_has_its_trials_and_each_trial_its_seeds(searched: Search) -> None:
    results = load_runs(searched.folder)
    assert {(result.norm, result.seed) for result in results} == {(n, s) for n in ("bn", "abn") for s in (1000, 1001)}
    assert len(results) == 2 * 2 * 2
    rows = searched.table()
    assert [row["norm"] for row in rows] == ["bn"] * 2 + ["abn"] * 2
    assert {row["seeds"] for row in rows} == {"2"}
    with open(searched.write(), newline="") as file:
        assert [*csv.DictReader(file)] == rows


def test_a_trial_is_judged_by_its_mean_validation_accuracy(searched: Search) -> None:
    """Against the records, found by what the runs' configurations say."""
    for row in searched.table():
        accuracies = [
            run.result.val_acc_last or 0.0
            for run in find_runs(searched.folder)
            if run.norm == row["norm"]
            and run.result is not None
            and f"{yaml.safe_load((run.directory / 'config.yaml').read_text())['recipe']['optimizer']['lr']:.4g}"
            == row["recipe.optimizer.lr"]
        ]
        assert len(accuracies) == 2
        assert row["val acc %"] == f"{100 * statistics.mean(accuracies):.2f}"
    for norm, values in searched.best().items():
        mine = [row for row in searched.table() if row["norm"] == norm]
        best = max(mine, key=lambda row: float(row["val acc %"]))
        assert values == [f"recipe.optimizer.lr={best['recipe.optimizer.lr']}"]


def test_norms_begin_with_the_same_proposals(searched: Search) -> None:
    bn, abn = ({r["recipe.optimizer.lr"] for r in searched.table() if r["norm"] == norm} for norm in ("bn", "abn"))
    assert bn == abn
    assert len(bn) == 2


def test_a_stopped_search_goes_on_with_what_it_had_begun(searched: Search, tmp_path: Path) -> None:
    """The trial that was cut off is trained with its values; an undisturbed search has the same trials."""
    total = [trial.state.name for study in searched.studies.values() for trial in study.get_trials()]
    assert sorted(total) == ["COMPLETE"] * 4 + ["FAIL"]
    undisturbed = search(tmp_path)
    undisturbed.run(1, **SILENT)
    assert {tuple(row.values()) for row in undisturbed.table()} <= {tuple(row.values()) for row in searched.table()}
    before = len(load_runs(searched.folder))
    search(searched.folder.parent).run(2, **SILENT)
    assert len(load_runs(searched.folder)) == before


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    one, other = search(tmp_path), search(tmp_path)
    first = one._claim(1)
    second = other._claim(1)
    assert first is not None
    assert second is not None
    assert (first[0].study_name, second[0].study_name) == ("bn", "abn")
    assert other._claim(1) is None
    first[2].release()
    again = other._claim(1)  # whoever had it is gone
    assert again is not None
    assert (again[0].study_name, again[1].params) == ("bn", first[1].params)
    assert isinstance(again[2], FileLock)


def test_values_that_diverge_are_a_trial_too(tmp_path: Path) -> None:
    words = ["recipe.optimizer.name=sgd", "recipe.optimizer.lr=choice(1e38,1e-2)", "norm=bn"]
    diverging = Search(read_space([*WORDS[:-3], "seed=1000", f"results_dir={tmp_path}", *words]))
    diverging.studies["bn"].enqueue_trial({"recipe.optimizer.lr": "1e+38"})
    diverging.studies["bn"].enqueue_trial({"recipe.optimizer.lr": "0.01"})
    said: list[str] = []
    diverging.run(2, said.append)
    assert "diverged in epoch 1" in said[0]
    assert [row["val acc %"] == "diverged" for row in diverging.table()] == [False, True]
    assert diverging.best() == {"bn": ["recipe.optimizer.lr=0.01"]}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["norm=bn", "seed=1000", "recipe.epochs=1"], "there is nothing to search"),
        ([LR, "seed=a,b"], "it should be a list of seeds"),
        ([LR, "recipe=paper"], "recipe.val_fraction=0, but a search is judged by validation accuracy"),
        (["recipe.optimizer.lr=tag(log,interval(0,1))"], "is not a range to search"),
        ([LR, "recipe.epochs=0"], "recipe.epochs=0 is not allowed"),
        ([LR, "study=trained"], "study=trained is for a sweep; a search takes dataset=, model=, norm= and seed="),
        ([LR, "seeds=five"], "seeds=five is for a sweep"),
        (["+recipe.lrr=interval(1,2)"], "recipe.lrr is not a key of the configuration"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Search(read_space([f"results_dir={tmp_path}", *words]))
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_for_train_py_alone_is_refused(tmp_path: Path) -> None:
    for word, sentence in (
        ("devices=2", "devices=1 is the only choice in a search"),
        ("dry_run=true", "dry_run=true is"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Search(read_space([*WORDS, f"results_dir={tmp_path}", word]))
    assert not list(tmp_path.iterdir())


def test_another_search_in_the_folder_is_refused(searched: Search) -> None:
    for words in (["recipe.label_smoothing=0.1"], ["seed=1000,1001,1002"], ["recipe.batch_size=16,32"]):
        with pytest.raises(ConfigError, match="holds another search"):
            search(searched.folder.parent, *words)


def test_values_that_a_run_refuses_end_the_search_in_a_sentence(tmp_path: Path) -> None:
    refused = Search(read_space([*WORDS[:-1], f"results_dir={tmp_path}", "recipe.batch_size=choice(9999)"]))
    with pytest.raises(ConfigError, match=r"^recipe\.batch_size=9999: .*is larger than the set"):
        refused.run(1, **SILENT)
    assert [trial.state.name for trial in refused.studies["bn"].get_trials()] == ["FAIL"]


def test_the_script_prints_its_trials_and_the_best(
    searched: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the runs of the search that is there; in 80 columns."""
    GlobalHydra.instance().clear()
    monkeypatch.setenv("COLUMNS", "80")
    words = [*WORDS, f"results_dir={searched.folder.parent}"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_script(monkeypatch, "search", "--trials", 2, *words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("best with")[0].splitlines())) <= 80
    for norm, (value,) in searched.best().items():
        assert f"best with norm={norm}: {value}\n" in out
    assert f"written to {searched.folder / 'search.csv'}" in out
    assert run_script(monkeypatch, "search", "norm=bn", f"results_dir={searched.folder.parent}") == 1
    assert capsys.readouterr().err.startswith("error: there is nothing to search")

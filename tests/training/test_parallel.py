"""How many runs at once: the choice that follows from the speeds, and the speeds of processes that train."""

import json
from collections.abc import Callable

import pytest
import torch

from abn_exp.config import Config
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.training import parallel as at_once
from abn_exp.training.parallel import candidates, choose, measure, measure_best_count
from tests.helpers.cli import Cli

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 100.0, 2: 190.0, 4: 195.0}, 2),  # four are hardly faster than two
        ({1: 100.0, 2: 190.0, 4: 380.0}, 4),
        ({1: 100.0, 2: 109.0, 4: 80.0}, 1),  # several gain nothing
        ({1: 100.0, 2: 60.0, 4: 150.0}, 4),
        ({1: 100.0}, 1),
        ({}, 1),
    ],
)
def test_the_least_number_that_is_nearly_the_best_is_chosen(rates: dict[int, float], expected: int) -> None:
    assert choose(rates) == expected


def test_no_more_are_tried_than_there_are_runs_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "cpu_count", lambda: 12)
    assert candidates(100, CPU, 1) == [1, 2, 4, 8, 12]
    assert candidates(100, CPU, 4) == [1, 2, 3]
    assert candidates(5, CPU, 1) == [1, 2, 4]
    assert candidates(1, CPU, 1) == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert candidates(100, torch.device("cuda", 0), 1) == [1, 2, 4, 8, 12]
    monkeypatch.setattr(at_once, "cpu_count", lambda: 64)
    assert candidates(100, torch.device("cuda", 0), 1) == [1, 2, 4, 8, 16]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # sixteen for each
    assert candidates(100, torch.device("cuda", 0), 1) == [1, 2, 4, 8, 16, 32]


def test_one_run_or_one_core_is_not_measured(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "measure", None)
    assert measure_best_count([make_plan()]) == 1
    monkeypatch.setattr(at_once, "cpu_count", lambda: 1)
    assert measure_best_count([make_plan()] * 10) == 1


def test_the_largest_batch_is_measured(make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of processes that fits into a GPU's memory with smaller ones might not with it."""
    asked: list[Config] = []

    def measured(config: Config, *_: object) -> dict[int, float]:
        asked.append(config)
        return {1: 100.0, 2: 190.0}

    monkeypatch.setattr(at_once, "measure", measured)
    monkeypatch.setattr(at_once, "cpu_count", lambda: 2)
    plans = [make_plan(f"recipe.batch_size={size}") for size in (16, 64, 32)]
    assert measure_best_count(plans) == 2
    assert [config.recipe.batch_size for config in asked] == [64]


# Measures in forks of a process that has imported what they need; the last word of the command is a configuration.
MEASURED = """
import json, logging, multiprocessing, sys
import torch
from abn_exp.config import parse
from abn_exp.training import parallel
parallel._spawn = multiprocessing.get_context("fork")
parallel._data_bytes = lambda _: 0.0
parallel.WARM = 0.05
logging.basicConfig()
print(json.dumps(parallel.measure(parse(json.loads(sys.argv[-1])), "abn", {counts}, torch.device("cpu"), 0.1)))
raise SystemExit
"""


def measured(cli: Cli, config: Config, counts: list[int], inject: str = "") -> tuple[dict[str, float], str]:
    """Return the images a second by the number of processes, and what was said."""
    done = cli.run(json.dumps(config.model_dump()), inject=inject + MEASURED.format(counts=counts))
    assert done.code == 0, done.err
    return json.loads(done.out), done.err


def test_processes_are_measured_as_they_train_together(cli: Cli, make_plan: Callable[..., RunPlan]) -> None:
    fixed = "from abn_exp.training import parallel\nparallel.images_per_second = lambda *_: 100.0\n"
    assert measured(cli, make_plan().config, [1, 2], fixed)[0] == {"1": 100.0, "2": 200.0}


def test_what_does_not_fit_into_memory_is_left_out(cli: Cli, make_plan: Callable[..., RunPlan]) -> None:
    """Not even one of them fits."""
    little = "import abn_exp.training.parallel; abn_exp.training.parallel._free_bytes = lambda _: 1e6\n"
    assert measured(cli, make_plan().config, [1], little)[0] == {}


def test_a_process_that_ends_leaves_its_number_out(cli: Cli, make_plan: Callable[..., RunPlan]) -> None:
    broken = make_plan().config.model_copy(update={"norm": {"_target_": "no.such.Norm"}})
    rates, said = measured(cli, broken, [1])
    assert rates == {}
    assert "has ended" in said


def test_numbers_that_fit_are_measured_before_one_that_does_not(cli: Cli, make_plan: Callable[..., RunPlan]) -> None:
    """As where a GPU's memory is used up by the second process."""
    second = """
import multiprocessing
from abn_exp.training import parallel
begin = parallel.begin
parallel.begin = lambda *a: 1 / 0 if multiprocessing.current_process().name.endswith("-2") else begin(*a)
"""
    rates, said = measured(cli, make_plan().config, [1, 2], second)
    assert list(rates) == ["1"]
    assert "has ended" in said


def test_processes_of_their_own_are_measured(make_plan: Callable[..., RunPlan]) -> None:
    """Started anew, as CUDA needs them."""
    rates = measure(make_plan().config, "abn", [1], CPU, 0.1)
    assert rates[1] > 0


def test_images_are_counted_as_the_loader_keeps_them(make_plan: Callable[..., RunPlan]) -> None:
    config = make_plan("dataset=cifar10", "dataset.train_images=null", tiny=False).config
    assert at_once._data_bytes(config) == 50_000 * 40 * 40 * 4 * 2


@pytest.mark.parametrize("value", ["0", "-1", "fast", "1.5", "true", "null"])
def test_other_values_are_refused_in_a_sentence(make_plan: Callable[..., RunPlan], value: str) -> None:
    with pytest.raises(ConfigError, match=r"seeds_at_once=.* is not allowed: it .*\.$") as error:
        make_plan(f"seeds_at_once={value}")
    assert "\n" not in str(error.value)


def test_it_is_not_part_of_what_was_run(make_plan: Callable[..., RunPlan]) -> None:
    assert make_plan("seeds_at_once=4").variant == make_plan().variant

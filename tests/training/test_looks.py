"""The plan of a multirun with looks: what it compares, what it refuses, and when no more seeds are needed."""

import json
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, flag_override

from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.report.looks import read_plan, write_plan
from abn_exp.training import looks
from abn_exp.training.looks import check_command, is_decided
from abn_exp.training.sweep import jobs
from tests.helpers.records import finish_run, start_run
from tests.helpers.runs import REPOSITORY

Compose = Callable[..., RunPlan]
LOOKS = ["looks=[2,3]", "spending=pocock"]


@pytest.fixture
def pair(make_plan: Compose) -> list[RunPlan]:
    return [make_plan(f"norm={norm}", *LOOKS) for norm in ("bn", "abn")]


def accept(runs: list[RunPlan], *typed: str, multirun: bool = True) -> None:
    """Check a command as a sweep does, and write the plan that it makes."""
    plan = check_command(runs, set(typed), multirun=multirun)
    if plan is not None:
        write_plan(runs[0].study, plan)


def refused(runs: list[RunPlan], *typed: str, multirun: bool = True) -> str:
    with pytest.raises(ConfigError) as error:
        check_command(runs, set(typed), multirun=multirun)
    return str(error.value)


def test_without_a_study_the_one_norm_beside_bn_is_the_question(pair: list[RunPlan], make_plan: Compose) -> None:
    plan = looks.make_plan(pair)
    assert (plan.norm, plan.reference, plan.groups) == ("abn", "bn", (("digits", "binarynet", pair[0].variant),))
    assert (plan.looks, plan.seeds, plan.delta, plan.spending) == ((2, 3), (0, 1, 2), 0.5, "pocock")
    more = [*pair, make_plan("norm=iebn", *LOOKS)]
    assert "needs one primary comparison: norm=bn,OTHER" in refused(more)
    assert "this command has norm=bn" in refused(pair[:1])
    two = [*pair, *(make_plan(f"norm={norm}", "recipe.batch_size=16", *LOOKS) for norm in ("bn", "abn"))]
    assert len(looks.make_plan(two).groups) == 2  # one number: pooled


@pytest.mark.parametrize(
    ("primary", "message"),
    [
        ("{norm: abn, statistic: spread}", "the primary comparison of this study is one of spreads"),
        ("{norm: abn, reference: iebn}", "compares abn with iebn, and this command runs norm=bn,abn"),
        ("{norm: abn, datasets: [cifar10]}", "compares abn with bn on dataset=cifar10, and this command runs"),
    ],
)
def test_a_primary_comparison_without_one_number_is_refused(primary: str, message: str, make_plan: Compose) -> None:
    runs = [make_plan(f"norm={norm}", f"primary={primary}", *LOOKS) for norm in ("bn", "abn")]
    assert message in refused(runs)
    assert not (runs[0].directory.parents[4] / "plan.json").exists()


def test_looks_without_a_level_are_refused_before_anything_is_trained(make_plan: Compose) -> None:
    words = ["looks=[2,1000]", "spending=obrien_fleming"]
    runs = [make_plan(f"norm={norm}", *LOOKS, *words) for norm in ("bn", "abn")]
    assert refused(runs) == "looks=[2, 1000]: The look at 2 of 1000 values has no error to spend; look later."
    assert not (runs[0].directory.parents[4] / "plan.json").exists()


def test_several_cells_need_a_pooled_comparison(make_plan: Compose) -> None:
    def runs(statistic: str) -> list[RunPlan]:
        primary = f"primary={{norm: abn, statistic: {statistic}}}"
        return [
            make_plan(f"norm={norm}", f"recipe.batch_size={size}", primary, *LOOKS)
            for norm in ("bn", "abn")
            for size in (16, 32)
        ]

    assert "needs one number, and the primary comparison has 2, one a cell" in refused(runs("mean"))
    assert len(looks.make_plan(runs("pooled")).groups) == 2


def test_the_plan_is_written_once_and_not_contradicted(pair: list[RunPlan], make_plan: Compose) -> None:
    folder = pair[0].directory.parents[4]
    assert "leave out seed=" in refused(pair, "seed")
    accept(pair)
    written = (folder / "plan.json").read_bytes()
    assert check_command(pair, set(), multirun=True) is None
    assert (folder / "plan.json").read_bytes() == written
    other = [make_plan(f"norm={norm}", *LOOKS, "delta=1.0") for norm in ("bn", "abn")]
    assert "written before the first run, which has delta 0.5, not 1.0. Use another name=." in refused(other)
    fixed = [make_plan("norm=abn", f"seed={seed}") for seed in (0, 1)]
    assert "adds runs to them in another way" in refused(fixed)
    names = [make_plan(f"norm={norm}", *LOOKS, f"name={name}") for norm in ("bn", "abn") for name in ("a", "b")]
    assert "has one plan, and this command has name=a,b" in refused(names)


@pytest.mark.parametrize("multirun", [False, True])
def test_a_run_alone_is_one_that_the_present_look_asks_for(
    pair: list[RunPlan], make_plan: Compose, multirun: bool
) -> None:
    def alone(seed: int, *more: str) -> list[RunPlan]:
        return [make_plan("norm=abn", f"seed={seed}", *more)]

    accept(pair)
    folder, variant = pair[0].study, pair[0].variant
    accept(alone(1), multirun=multirun)
    assert "its looks have not asked for seed 2; use seeds=until_decided as it was" in refused(
        alone(2), multirun=multirun
    )
    assert "has delta 0.5, not 1.0" in refused(alone(1, "delta=1"), multirun=multirun)
    accept([make_plan("norm=iebn", "seed=9")], multirun=multirun)  # another norm is no part of the comparison
    for norm, seed, score in (("bn", 0, 0.7), ("abn", 0, 0.75), ("bn", 1, 0.71), ("abn", 1, 0.7)):
        finish_run(folder, norm, seed, score, variant=variant)
    assert not is_decided(folder, 1)
    accept(alone(2), multirun=multirun)  # the second look asks for it
    assert "would train again what" in refused(alone(0, "force=true"), multirun=multirun)
    plan = read_plan(folder)
    assert plan is not None
    plan.entries[0]["verdict"] = "better"  # it ended there
    write_plan(folder, plan)
    assert "have not asked for seed 2" in refused(alone(2), multirun=multirun)


def test_what_plans_looks_is_refused_where_there_are_none(make_plan: Compose) -> None:
    one = [make_plan("norm=abn")]
    sentence = "is for seeds=until_decided, which this command lacks; leave it out."
    assert refused(one, "looks", multirun=False) == f"looks= {sentence}"
    for multirun in (False, True):
        assert refused(one, "spending", multirun=multirun) == f"spending= {sentence}"
    assert "this command is one run; use seeds=until_decided" in refused([make_plan(*LOOKS)], "looks", multirun=False)


def test_runs_that_were_there_before_the_plan_are_refused(pair: list[RunPlan]) -> None:
    start_run(pair[0].directory.parents[4], "bn", 0, variant=pair[0].variant)
    assert "holds 1 runs of this comparison that were begun without a plan" in refused(pair)


def test_runs_of_a_later_look_that_have_not_ended_are_among_its_seeds(pair: list[RunPlan]) -> None:
    """Another process trains them: the sweep has to say that they have no result."""
    folder, variant = pair[0].directory.parents[4], pair[0].variant
    accept(pair)
    for seed, (bn, abn) in enumerate([(0.70, 0.75), (0.71, 0.70)]):
        finish_run(folder, "bn", seed, bn, variant=variant)
        finish_run(folder, "abn", seed, abn, variant=variant)
    assert not is_decided(folder, 1)
    assert is_decided(folder, 2)


def test_it_ends_at_the_first_verdict_and_stays_there(pair: list[RunPlan], caplog: pytest.LogCaptureFixture) -> None:
    folder, variant = pair[0].directory.parents[4], pair[0].variant
    accept(pair)
    for seed, (bn, abn) in enumerate([(0.70, 0.75), (0.71, 0.70)]):
        finish_run(folder, "bn", seed, bn, variant=variant)
        if seed == 0:
            finish_run(folder, "abn", seed, abn, variant=variant)
    assert is_decided(folder, 1)  # nothing more can be run: one run of the look has not come to its end
    assert "No look at 2 seeds: 1 of its runs have not come to their end." in caplog.text
    assert json.loads((folder / "plan.json").read_text())["entries"] == []
    finish_run(folder, "abn", 1, 0.70, variant=variant)
    assert not is_decided(folder, 1)
    first = (folder / "plan.json").read_bytes()
    assert not is_decided(folder, 1)  # typed again: the look is not taken twice
    assert (folder / "plan.json").read_bytes() == first
    finish_run(folder, "bn", 2, 0.72, variant=variant)
    (start_run(folder, "abn", 2, variant=variant) / "FAILED").write_text("diverged: the loss is nan in epoch 1")
    assert is_decided(folder, 2)
    plan = read_plan(folder)
    assert plan is not None
    assert [entry["verdict"] for entry in plan.entries] == ["undecided", "undecided"]
    assert plan.entries[1]["failed"] == [1, 0]
    assert plan.decided


def overrides_of(*arguments: str) -> list[list[str]]:
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        chosen = [argument for argument in arguments if argument != "norm=bn,abn"]  # Hydra sweeps over it later
        config = compose("config", chosen, return_hydra_config=True)
    with flag_override(config, ["struct", "readonly"], [False, False]):
        config.hydra.overrides.task = list(arguments)
    return jobs(config)


def test_the_confound_study_flips_one_switch_at_a_time_from_either_end() -> None:
    runs = overrides_of("study=confound", "seed=0", "norm=bn")
    assert len(runs) == 12
    flips = [[o for o in run if o.startswith("recipe")] for run in runs]
    assert [sum(o.startswith("recipe.") for o in flip) for flip in flips] == [0, 1, 1, 1, 1, 1] * 2
    assert [flip[0] for flip in flips] == ["recipe=fixed"] * 6 + ["recipe=paper"] * 6
    keys = [flip[1].split("=")[0] for flip in flips if len(flip) > 1]
    assert keys[:5] == keys[5:]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        paper, fixed = (compose("config", [f"recipe={name}"]) for name in ("paper", "fixed"))
        for flip in flips:
            here, there = compose("config", flip), paper if flip[0] == "recipe=fixed" else fixed
            for key in [override.split("=")[0] for override in flip[1:]]:  # as at the other end
                assert OmegaConf.select(here, key) == OmegaConf.select(there, key)


def test_looks_set_the_seeds_and_split_the_sweep() -> None:
    assert len(overrides_of("study=accuracy", "seeds=until_decided", "dataset=cifar10", "model=binarynet")) == 40
    runs = overrides_of("norm=bn,abn", "seeds=until_decided", "looks=[2,4]")
    seeds = [next(override for override in run if override.startswith("seed=")) for run in runs]
    assert seeds == ["seed=0"] * 2 + ["seed=1"] * 2 + ["seed=2"] * 2 + ["seed=3"] * 2
    pairs = [
        {word for word in run if word.split("=")[0] in ("norm", "seed")} for run in overrides_of("study=trained")
    ]
    assert pairs[:3] == [{"norm=bn", "seed=0"}, {"norm=abn", "seed=0"}, {"norm=bn", "seed=1"}]  # both norms of a seed

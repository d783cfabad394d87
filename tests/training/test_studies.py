"""Every study expands to its cells, the command line wins over it, and one command runs and reports it."""

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from abn_exp.identity import RunPlan
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.training import sweep
from tests.helpers.cli import FORKED_WORKERS, NO_FIGURES, Cli
from tests.helpers.runs import REPOSITORY, composing

PAPER_SETS = {"cifar10", "cifar100", "tinyimagenet"}
BOTH = {"binarynet", "resnet18_paper"}
ABLATED = {
    *("bn", "bn_noscale", "abn", "abn_scale", "abn_gate", "abn_noshift", "abn_forward", "abn_backward", "iebn")
}
PLAIN = {"fixed"}
# Each end of study=confound, and one switch at a time from there.
SWITCHED = {
    *("fixed_test_every_epoch-true", "fixed_optimizer.rebuild_each_epoch-true_test_every_epoch-true"),
    *("fixed_schedule.name-constant_test_every_epoch-true", "fixed_test_every_epoch-true_val_fraction-0"),
    *("fixed_normalization-imagenet_test_every_epoch-true", "fixed_init-authors_test_every_epoch-true"),
    *("paper", "paper_optimizer.rebuild_each_epoch-false", "paper_schedule.name-cosine"),
    *("paper_val_fraction-0.1", "paper_normalization-dataset", "paper_init-torch"),
}
PUBLISHED = {"bn", "abn", "abn_paper"}
PRECISIONS = {"fixed", "fixed_precision-exact16", "fixed_precision-bf16"}
# study: results' folder, seeds, data sets, models, norms, variants
STUDIES = {
    "accuracy": ("accuracy", 5, PAPER_SETS, BOTH, {"bn", "abn"}, PLAIN),
    "variance": ("variance", 20, {"cifar10", "cifar100"}, BOTH, {"bn", "abn"}, PLAIN),
    "confound": ("confound", 5, {"cifar10"}, {"resnet18_paper"}, PUBLISHED, SWITCHED),
    "protocols": ("protocols", 5, {"cifar10"}, {"resnet18_paper"}, PUBLISHED, {"fixed", "paper"}),
    "precision": ("precision", 5, {"cifar10"}, {"resnet18_paper"}, {"bn", "abn"}, PRECISIONS),
    "ablation": ("ablation", 5, {"cifar10"}, {"resnet18_paper"}, ABLATED, PLAIN),
}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with composing():
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides), return_hydra_config=True)


@cache
def plans(*overrides: str) -> list[RunPlan]:
    return list(sweep.expand(composed(*overrides)).values())


def cells(found: list[RunPlan]) -> set[tuple[str, ...]]:
    return {plan.directory.parts[-5:-1] for plan in found}


def test_every_study_is_listed_here() -> None:
    assert {path.stem for path in (REPOSITORY / "conf/study").glob("*.yaml")} == {
        "budget",
        "schedules",
        "trained",
        *STUDIES,
    }


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_its_cells_at_full_size_and_its_seeds(study: str) -> None:
    name, seeds, datasets, models, norms, variants = STUDIES[study]
    found = plans(f"study={study}", "seed=0")
    expected = {(d, m, n, v) for d in datasets for m in models for n in norms for v in variants}
    assert cells(found) == expected
    assert len(found) == len(expected)
    runs = sweep.jobs(composed(f"study={study}"))
    typed = Counter(word for run in runs for word in run if word.startswith("seed="))
    assert typed == {f"seed={seed}": len(expected) for seed in range(seeds)}
    assert len({tuple(run) for run in runs}) == len(runs) == seeds * len(expected)
    assert {plan.config.name for plan in found} == {name}
    assert {(plan.config.recipe.epochs, plan.config.recipe.batch_size) for plan in found} == {(200, 256)}
    assert {plan.config.model["width"] for plan in found} <= {3, 5}
    assert all(plan.config.question is not None and plan.config.question.strip().endswith("?") for plan in found)


def test_budget_crosses_schedules_and_epochs() -> None:
    found = plans("study=budget")
    expected = Counter(itertools.product(("constant", "cosine"), (20, 50, 100, 200), (0, 1, 2)))
    assert Counter((p.config.recipe.schedule.name, p.config.recipe.epochs, p.config.seed) for p in found) == expected
    assert len({plan.directory for plan in found}) == len(found)


def test_trained_is_one_cell_of_a_narrow_network_with_seeds_for_three_looks() -> None:
    """docs/plan.md promises it so; the runs that are finished have these names."""
    found = plans("study=trained")
    variant = "fixed_model.width-0.25_batch_size-128_epochs-20_optimizer.lr-0.005"
    assert cells(found) == {("cifar10", "binarynet", norm, variant) for norm in ("bn", "abn")}
    assert Counter(plan.config.seed for plan in found) == dict.fromkeys(range(20), 2)
    assert all(plan.config.looks == [5, 10, 20] and plan.config.delta == 0.5 for plan in found)
    assert {plan.config.precision for plan in found} == {"fp32"}


def test_the_search_changes_one_thing_at_a_time_and_shares_its_seeds_with_no_study() -> None:
    found = plans("study=schedules")
    assert {plan.config.seed for plan in found} == {1000, 1001, 1002}
    assert len(found) == len({plan.directory for plan in found}) == 15 * 2 * 3
    assert len(cells(found[:6])) == 2  # a row is whole before the next begins
    (base,) = {plan.cell[3] for plan in found[:6]}
    assert base == "fixed_model.width-0.25_precision-exact16_batch_size-128_epochs-10_optimizer.lr-0.005"


@pytest.mark.parametrize("study", STUDIES)
def test_the_command_line_wins_over_a_study(study: str) -> None:
    """What it does not name stays the study's."""
    _, _, _, models, _, variants = STUDIES[study]
    found = plans(f"study={study}", "dataset=digits", "norm=abn", "seeds=three", "name=mine")
    expected = {("digits", m, "abn", v) for m in models for v in variants}
    assert cells(found) == expected
    assert Counter(plan.config.seed for plan in found) == dict.fromkeys(range(3), len(expected))
    assert {plan.config.name for plan in found} == {"mine"}
    assert all(plan.config.recipe.epochs < 50 for plan in found)


def test_ablation_varies_one_part_of_the_norm_at_a_time() -> None:
    """Each step of the ablation differs from the one it is compared with in one option of the same class."""
    norms = {plan.choices["norm"]: plan.config.norm for plan in plans("study=ablation", "seed=0")}
    options = {k: v for k, v in norms.items() if v["_target_"].endswith(AttentionBatchNorm2d.__name__)}
    for one, other, key in [
        *(
            ("abn_forward", "bn_noscale", "gate"),
            ("abn_backward", "bn_noscale", "gate"),
            ("abn", "bn_noscale", "gate"),
        ),
        *(("abn_scale", "abn", "scale"), ("abn_gate", "abn", "scale"), ("abn_noshift", "abn", "shift")),
    ]:
        keys = options[one].keys() | options[other].keys()
        assert [k for k in keys if options[one].get(k) != options[other].get(k)] == [key]


@pytest.mark.slow
def test_one_command_runs_a_study_and_reports_it(cli: Cli, tmp_path: Path) -> None:
    done = cli.run(
        *("study=protocols", "dataset=digits", "seed=0", "dataset.train_images=100"),
        *("norm=bn,abn", "model.width=0.0625", "recipe.epochs=1", "recipe.batch_size=32"),
        *(f"results_dir={tmp_path}", f"hydra.sweep.dir={tmp_path}/hydra"),
        timeout=600,
        inject=FORKED_WORKERS + NO_FIGURES,
    )
    assert done.code == 0, done.err + done.out
    text = (tmp_path / "protocols/report.md").read_text()
    assert text.startswith("# protocols\n\n**Primary comparison: abn against bn. Over 2 cells, abn - bn is ")
    assert "How much of the difference between ABN and BN" in text
    assert "- runs: 4 finished of 4 started" in text
    assert "undecided, one seed has no interval" in text
    assert "## Effect of recipe, against fixed (exploratory)\n" in text
    assert "## How the difference to bn changes with recipe (exploratory)\n" in text
    assert "## Which epoch is read\n" in text
    assert "abn - bn is " in done.out

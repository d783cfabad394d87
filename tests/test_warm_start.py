"""`init_from`: a run that starts from another run's weights, which identify it wherever they lie."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose

from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.report.build import _options
from abn_exp.results import find_runs
from abn_exp.trained_network import load_network, read_config, write_config
from abn_exp.training.run import run
from abn_exp.training.setup import make_network
from abn_exp.training.sweep import expand
from tests.helpers.runs import TINY, composing, plan_in, trained_study

Make = Callable[..., RunPlan]


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with BN, to be read only; there are ABN's and another seed's beside it."""
    return next(trained_study(tmp_path_factory).glob("digits/binarynet/bn/*/seed-0"))


def test_a_run_starts_from_the_weights_of_another(make_plan: Make, first_stage: Path) -> None:
    plan = make_plan("norm=bn", f"init_from={first_stage}", "recipe.epochs=1", "recipe.optimizer.lr=1e-30")
    start = make_network(plan.config, "bn", 10, torch.device("cpu")).state_dict()
    source = load_network(first_stage).state_dict()
    assert start.keys() == source.keys()
    assert all(torch.equal(start[name], source[name]) for name in start)
    run(plan, "python train.py")  # it learns nothing, so that it ends with what the first stage ended with
    ended = dict(load_network(plan.directory).named_parameters())
    assert all(torch.allclose(value, source[name], rtol=0, atol=1e-20) for name, value in ended.items())
    assert f"init_digest-{plan.config.init_digest}" in plan.variant
    assert read_config(plan.directory)["init_digest"] == plan.config.init_digest


def test_what_fits_is_taken_and_the_rest_is_named(
    make_plan: Make, first_stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ABN has no scale, which BN has, and so all else fits."""
    source = load_network(first_stage).state_dict()
    plan = make_plan("norm=abn", f"init_from={first_stage}")
    fresh = make_network(make_plan("norm=abn").config, "abn", 10, torch.device("cpu")).state_dict()
    with caplog.at_level("INFO"):
        start = make_network(plan.config, "abn", 10, torch.device("cpu")).state_dict()
    assert start.keys() < source.keys()
    assert all(torch.equal(start[name], source[name]) for name in start)
    assert not torch.equal(start["layer1.conv.weight"], fresh["layer1.conv.weight"])
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert set(line.split(": ")[1].split(", ")) == source.keys() - start.keys()
    caplog.clear()
    abn = next(first_stage.parents[2].glob("abn/*/seed-0"))
    with caplog.at_level("INFO"):
        other = make_network(make_plan("norm=bn", f"init_from={abn}").config, "bn", 10, torch.device("cpu"))
    (line,) = [record.message for record in caplog.records if "started as usual" in record.message]
    names = line.split(": ")[1].split(", ")
    assert set(names) == source.keys() - start.keys()
    assert all(torch.equal(other.state_dict()[name], torch.ones_like(source[name])) for name in names)


def test_the_weights_and_not_their_place_identify_a_run(make_plan: Make, first_stage: Path, tmp_path: Path) -> None:
    shutil.copytree(first_stage, tmp_path / "elsewhere")
    here, there = make_plan(f"init_from={first_stage}"), make_plan(f"init_from={tmp_path / 'elsewhere'}")
    assert here.directory == there.directory
    assert here.config_hash == there.config_hash
    run(here, "python train.py")
    before = (here.directory / "result.json").stat().st_mtime_ns
    run(there, "python train.py")
    assert (here.directory / "result.json").stat().st_mtime_ns == before
    by_seed = make_plan(f"init_from={first_stage.parent}/seed-${{seed}}", "seed=0")  # as in a sweep
    assert by_seed.config.init_digest == here.config.init_digest
    plain, two_stages = make_plan(), plan_in(tmp_path, f"init_from={here.directory}")
    assert len({plan.config_hash for plan in (plain, here, two_stages)}) == 3
    assert make_plan("+init_digest=0123").config.init_digest is None


def test_a_sweep_starts_each_seed_from_its_own_weights(first_stage: Path, tmp_path: Path) -> None:
    """Its runs are one cell all the same, and comparable with another norm's, whose weights are from that norm."""
    source, own = tmp_path / "source", "${seed}"
    for seed in range(3):
        shutil.copytree(first_stage, source / f"seed-{seed}")
        (source / f"seed-{seed}" / "SHA256SUMS").unlink()
        path = source / f"seed-{seed}" / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"]["network.stem.norm.bias"] += seed
        torch.save(checkpoint, path)
    found = []
    with composing():
        for norm in ("bn", "abn"):
            words = [
                *TINY,
                f"results_dir={tmp_path}",
                f"norm={norm}",
                "seeds=three",
                f"init_from={source}/seed-{own}",
            ]
            found.append(expand(compose("config", words, return_hydra_config=True)))
    for plans in found:
        assert all(any(word.startswith(f"init_from={source}/seed-$") for word in words) for words in plans)
        assert len({plan.config.init_digest for plan in plans.values()}) == 3
        for plan in plans.values():
            assert plan.config.init_from == str(source / f"seed-{plan.config.seed}")
            write_config(plan.directory, plan.config.model_dump(), "python train.py")
    (cell,) = {plan.config.init_cell for plans in found for plan in plans.values()}
    (variant,) = {plan.variant for plans in found for plan in plans.values()}
    assert f"init_digest-{cell}" in variant
    options = _options(find_runs(tmp_path / "runs"))
    assert len(options) == 6
    assert {one["init_digest"] for one in options.values()} == {cell}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["init_from=/nowhere"],
            "init_from=/nowhere has no checkpoints/last.ckpt; give the folder of a run (.../seed-0)",
        ),
        (["init_from={run}", "model.width=0.125"], "stem.conv.weight is (8, 3, 3, 3) there and (16, 3, 3, 3) here"),
        (["init_from={run}", "dataset=cifar100"], "head.7.weight is (10, 64) there and (100, 64) here"),
        (["init_from={run}", "model=resnet18_paper"], "does not fit"),
        (["init_from=''"], "init_from= is not allowed"),
    ],
)
def test_a_mistake_is_one_sentence(make_plan: Make, first_stage: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(*(override.format(run=first_stage) for override in overrides))
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_or_exchanged_weights_are_refused(make_plan: Make, first_stage: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(first_stage, source)
    plan = make_plan(f"init_from={source}", "norm=bn")
    shutil.copy(source / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    shutil.copy(first_stage.with_name("seed-1") / "checkpoints" / "last.ckpt", source / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="its weights have changed meanwhile"):
        run(plan, "python train.py")
    (source / "checkpoints" / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"init_from: .*last\.ckpt is damaged"):
        make_plan(f"init_from={source}", "norm=bn")

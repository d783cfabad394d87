"""What decides a run's identity, and that a record of an earlier version is found, shown and reported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose
from PIL import Image
from pydantic import Field
from torch import nn

from abn_exp import identity
from abn_exp.config import Config, RecipeConfig, parse, read
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan, plan_of
from abn_exp.options import differing_options
from abn_exp.records import RECORDS, RUN_FILES, read_records, read_run_file, write_records
from abn_exp.report.build import build_report
from abn_exp.report.writers import cells_csv, markdown
from abn_exp.results import Run, find_runs, load_runs, read_result
from abn_exp.trained_network import read_config
from abn_exp.training.run import run
from abn_exp.training.setup import load_data
from tests.helpers.runs import REPOSITORY, composing

Make = Callable[..., RunPlan]
QUOTED = REPOSITORY / "results" / "quoted"


@pytest.fixture(scope="module")
def quoted_runs() -> list[Run]:
    return find_runs(QUOTED)


# --- Records of earlier versions ---


class MoreRecipe(RecipeConfig):
    fancy: float = 0.5


class MoreConfig(Config):
    recipe: MoreRecipe
    extra: int = Field(3, ge=1)


def more_norm(num_features: int, eps: float = 1e-5, momentum: float = 0.1, invented: str = "no") -> nn.Module:
    return nn.BatchNorm2d(num_features, eps, momentum)


@pytest.fixture
def more_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version: an option in the recipe, one at the top, and one in the signature of a norm."""
    monkeypatch.setattr("abn_exp.config.Config", MoreConfig)
    monkeypatch.setattr("abn_exp.options.Config", MoreConfig)
    monkeypatch.setattr(torch.nn, "BatchNorm2d", more_norm)


def test_every_quoted_run_has_the_same_identity_in_a_later_version(
    quoted_runs: list[Run], request: pytest.FixtureRequest
) -> None:
    def plans() -> list[RunPlan]:
        found = []
        for one in quoted_runs:
            assert one.result is not None
            choices = {"dataset": one.dataset, "model": one.model, "norm": one.norm, "recipe": one.result.recipe}
            found.append(RunPlan(parse(read_config(one.directory)), choices, one.variant))
        return found

    before = plans()
    hashes = [plan.config_hash for plan in before]
    request.getfixturevalue("more_options")
    later = plans()
    assert later[0].config.model_dump()["recipe"]["fancy"] == 0.5
    assert [plan.config_hash for plan in later] == hashes
    for plan, one in zip(later, quoted_runs, strict=True):
        assert differing_options(plan.config.model_dump(), read_config(one.directory)) == []
    changed = later[0].config.model_copy(update={"extra": 4})
    assert differing_options(changed.model_dump(), read_config(quoted_runs[0].directory)) == ["extra"]


@pytest.mark.usefixtures("more_options")
def test_a_later_version_writes_the_same_reports(quoted_runs: list[Run]) -> None:
    assert len(load_runs(QUOTED)) == len(quoted_runs) >= 368  # later studies add to them
    for name in ("precision", "ablation", "protocols"):
        report = build_report(QUOTED / name)
        assert cells_csv(report) == (QUOTED / name / "report.csv").read_text()
        tables = markdown(report, []).split("## How to read this")[0].split("\n![")[0]
        assert (QUOTED / name / "report.md").read_text().startswith(tables.rstrip())


@pytest.mark.usefixtures("more_options")
def test_old_and_new_records_are_one_cell_without_a_factor(tmp_path: Path) -> None:
    files = dict(read_records(QUOTED / "protocols" / RECORDS))
    newer: dict[str, bytes] = {}
    for name, content in files.items():
        if "/bn/fixed" in name and not name.endswith("SHA256SUMS"):
            if name.endswith("config.yaml"):
                config = yaml.safe_load(content)
                config["recipe"]["fancy"], config["extra"] = 0.5, 3
                config["norm"]["invented"] = "no"
                content = yaml.safe_dump(config).encode()
            newer[name.replace("seed-", "seed-1")] = content
    (tmp_path / "study").mkdir()
    write_records(tmp_path / "study" / RECORDS, files | newer)
    report = build_report(tmp_path / "study")
    assert [factor.name for factor in report.factors] == ["recipe"]
    assert {len(cell.runs) for cell in report.cells} == {5, 10}


def quoted_results(tmp_path: Path, name: str) -> Path:
    """Return an archive as a fresh clone has it, below the test's own results."""
    folder = tmp_path / "results" / "quoted" / name
    folder.mkdir(parents=True)
    shutil.copy(QUOTED / name / RECORDS, folder)
    return folder / RECORDS


SMALL = ["precision=fp32", "model=binarynet", "dataset.train_images=5000", "recipe.epochs=6", "recipe.batch_size=64"]


@pytest.mark.parametrize(
    ("study", "overrides"),
    [
        ("variance", ["model.width=0.125", "dataset=cifar100", "norm=abn", "seed=17"]),
        ("confound", ["study=confound", "model.width=0.125", "dataset=cifar10", "norm.momentum=0.9", "norm=bn"]),
        ("protocols", ["recipe=paper", "model.width=0.125", "dataset=cifar10", "norm=abn_paper", "seed=2"]),
        # Recorded when precision=auto was the default, so that the folder's name says fp32.
        ("precision", ["model.width=0.125", "dataset=cifar10", "norm=bn", "seed=9"]),
        ("accuracy", ["model.width=0.125", "dataset=tinyimagenet", "norm=bn", "dataset.images=[10000,2000]"]),
    ],
)
def test_a_quoted_run_is_finished_on_a_fresh_clone(
    make_plan: Make, tmp_path: Path, study: str, overrides: list[str]
) -> None:
    archive = quoted_results(tmp_path, study)
    where = [f"name={study}", "dataset.root=nowhere", "recipe=fixed"]
    overrides = [("+" if "images=[" in override else "") + override for override in overrides]
    plan = make_plan(*where, *SMALL, *overrides, tiny=False)
    source = archive.parent / plan.directory.relative_to(plan.study)
    expected = read_result(source)
    assert expected is not None
    assert run(plan, "python train.py") == expected
    names = {path.name for path in plan.directory.iterdir()} - {".lock"}
    assert names == {name for name in RUN_FILES if read_run_file(source, name) is not None}
    (found,) = find_runs(plan.study)
    assert (found.status, found.result) == ("finished", expected)


def test_a_part_of_a_data_set_is_not_the_data_set(make_plan: Make, tmp_path: Path) -> None:
    quoted_results(tmp_path, "accuracy")
    whole = ["name=accuracy", *SMALL, "dataset=tinyimagenet", "norm=bn", "model.width=0.125", "dataset.root=nowhere"]
    part = make_plan(*whole, "+dataset.images=[10000,2000]", tiny=False)
    full = make_plan(*whole, tiny=False)
    assert part.config_hash != full.config_hash
    assert identity.restore_quoted(full) is None
    assert not full.directory.exists()
    assert identity.restore_quoted(part) is not None
    assert read_config(part.directory)["dataset"]["images"] == [10000, 2000]  # which its train.log says
    later = make_plan(*whole, "+dataset.images=[10000,1000]", tiny=False)
    assert later.variant != part.variant
    assert "dataset.images--10000-1000" in later.variant


def test_images_held_are_found_out_when_a_run_is_planned(make_plan: Make, tmp_path: Path) -> None:
    overrides = ["dataset=cifar10", f"dataset.root={tmp_path / 'data'}", "model.width=0.0625"]
    before = make_plan(*overrides, tiny=False)
    assert before.config.dataset.images is None
    write_image_folder(tmp_path / "data" / "cifar10")
    after = make_plan(*overrides, tiny=False)
    assert after.config.dataset.images == [20, 10]
    assert after.config_hash != before.config_hash
    assert "dataset.images--20-10" in after.variant
    with pytest.raises(ConfigError, match=r"cifar10 has 20 \+ 10 images here, not 50000 \+ 10000"):
        load_data(before.config)
    assert len(load_data(after.config).train.labels) == 20


def write_image_folder(folder: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        for label in range(10):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (32, 32), (20 * label, number, 0))
                image.save(folder / split / f"class{label}" / f"{number}.png")


def test_what_differs_or_has_begun_is_not_taken(make_plan: Make, tmp_path: Path) -> None:
    archive = quoted_results(tmp_path, "protocols")
    overrides = ["name=protocols", *SMALL, "dataset=cifar10", "norm=bn", "model.width=0.125", "dataset.root=nowhere"]
    assert identity.restore_quoted(make_plan(*overrides, "recipe.optimizer.lr=0.01", tiny=False)) is None
    plan = make_plan(*overrides, tiny=False)
    plan.directory.mkdir(parents=True)
    (plan.directory / "train.log").touch()
    assert identity.restore_quoted(plan) is None
    shutil.rmtree(plan.directory)
    archive.write_bytes(archive.read_bytes()[:-50])
    assert identity.restore_quoted(plan) is None  # with a warning
    assert not plan.directory.exists()


def test_a_cell_keeps_the_name_that_it_was_recorded_under(make_plan: Make) -> None:
    plan = make_plan("precision=bf16")
    older = plan.directory.parent.with_name("fixed_from-an-earlier-version")
    (older / "seed-0").mkdir(parents=True)
    (older / "seed-0" / "config.yaml").write_text(yaml.safe_dump(plan.config.model_dump()))
    assert make_plan("precision=bf16", "seed=3").directory == older / "seed-3"
    assert make_plan("precision=exact16").directory.parent.name != older.name


def test_a_file_in_conf_that_was_changed_is_another_configuration(make_plan: Make) -> None:
    plan = make_plan()
    plan.directory.mkdir(parents=True)
    earlier = plan.config.model_dump()
    earlier["recipe"] = {**earlier["recipe"], "label_smoothing": 0.1}  # of a recipe's file as it was then
    (plan.directory / "config.yaml").write_text(yaml.safe_dump(earlier))
    with pytest.raises(ConfigError, match=r"another configuration \(different: recipe.label_smoothing\)"):
        run(make_plan(), "python train.py")


def test_a_name_in_other_letters_is_refused_where_the_file_system_takes_it() -> None:
    """It would be another run: its folder, hash and initial weights have the name."""
    with composing():
        cfg = compose("config", ["norm=abn"], return_hydra_config=True)
        with pytest.raises(ConfigError, match="norm=ABN is not allowed: no file in conf/norm has exactly this name"):
            plan_of(read(cfg), dict(cfg.hydra.runtime.choices) | {"norm": "ABN"}, False)

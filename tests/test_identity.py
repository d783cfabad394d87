"""What decides a run's identity, and that a record of an earlier version is found, shown and reported."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pydantic import Field
from torch import nn

from abn_exp import binarize, identity, models, norm, options
from abn_exp.config import Config, RecipeConfig, parse
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.options import all_options, differing_options, set_options
from abn_exp.records import RECORDS, RUN_FILES, read_records, read_run_file, write_records
from abn_exp.report.build import build_report
from abn_exp.report.writers import cells_csv, markdown
from abn_exp.results import Run, find_runs, load_runs, read_config, read_result
from abn_exp.training.run import run
from abn_exp.training.setup import load_data
from tests.helpers.runs import REPOSITORY

Make = Callable[..., RunPlan]
QUOTED = REPOSITORY / "results" / "quoted"

# What a configuration has where nothing sets it, as released: a changed value would give old records another meaning.
SCHEMA_DEFAULTS = {
    "dataset.path": None,
    "dataset.train_images": None,
    "dataset.images": None,
    "recipe.optimizer.name": None,
    "recipe.clip_grad_norm": None,
    "recipe.init": "torch",
    "recipe.clip_latent_range": [0, 1],
    "precision": "fp32",
    "devices": 1,
    "compile": False,
    "init_digest": None,
}
BINARIZATION = {
    "weight_estimator": "identity",
    "activation_estimator": "identity",
    "sign_zero": "plus",
    "pad_value": 0,
}
RESNET18 = BINARIZATION | {"activation_estimator": "clipped"}
SIGNATURE_DEFAULTS: list[tuple[Any, dict[str, Any]]] = [
    (models.binarynet, {"width": 3, "binarization": BINARIZATION}),
    (models.vgg_small, {"width": 1, "binarization": BINARIZATION}),
    (models.resnet18, {"width": 1, "shortcut": "bireal", "binarization": RESNET18}),
    (models.resnet18_paper, {"width": 5, "binarization": BINARIZATION}),
    (binarize.Binarization, BINARIZATION),
    (nn.BatchNorm2d, {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}),
    (norm.InstanceEnhancementBatchNorm2d, {"eps": 1e-5, "momentum": 0.1}),
    (
        norm.AttentionBatchNorm2d,
        {
            **{"eps": 1e-5, "momentum": 0.1, "gate": "full", "scale": "none", "shift": True, "unbiased": True},
            "persistent_stats": True,
        },
    ),
]


@pytest.fixture(scope="module")
def quoted_runs() -> list[Run]:
    return find_runs(QUOTED)


def target(thing: Any) -> dict[str, str]:
    module = "abn_exp.models" if thing.__module__.startswith("abn_exp.models") else thing.__module__
    return {"_target_": f"{module}.{thing.__qualname__}"}


def test_released_defaults_are_what_they_were() -> None:
    found = {key: value for key, value in options._schema_defaults(Config) if options._has_effect(key)}
    assert found == SCHEMA_DEFAULTS, "a new option is added to SCHEMA_DEFAULTS; a default once released stays"
    for thing, expected in SIGNATURE_DEFAULTS:
        found = options._node_defaults(target(thing), "x")
        flat = dict(options._flat(expected, "x"))
        assert {key: value for key, value in found.items() if key in flat} == flat, thing


def test_an_option_counts_where_it_is_not_at_its_default(make_plan: Make) -> None:
    plain = make_plan("model=resnet18", "norm=abn", tiny=False).config.model_dump()
    found = set_options(plain)
    assert {key for key in found if key.startswith(("model.", "norm."))} == {
        *("model._target_", "model.width", "norm._target_", "norm._partial_"),  # a width of 0.25
    }
    assert found["recipe.epochs"] == plain["recipe"]["epochs"]  # of an option without a default, always
    less = {**plain, "norm": {"_target_": plain["norm"]["_target_"], "_partial_": True}}
    less["model"] = {"_target_": "abn_exp.models.resnet18", "width": 0.25}
    assert differing_options(plain, less) == []
    less["model"] = {**less["model"], "binarization": {"_target_": "abn_exp.binarize.Binarization"}}
    assert differing_options(plain, less) == []  # what a node leaves out is as its function has it
    less["model"]["binarization"]["activation_estimator"] = "identity"
    assert differing_options(plain, less) == ["model.binarization.activation_estimator"]
    other = {**plain, "norm": {**plain["norm"], "gate": "none"}}
    assert differing_options(plain, other) == ["norm.gate"]


def test_without_effect_are_those_that_are_marked(make_plan: Make) -> None:
    plain = make_plan().config.model_dump()
    unmarked = {key.split(".")[0] for key in all_options(plain)}
    assert unmarked == {"dataset", "model", "norm", "recipe", "precision", "devices", "compile", "init_digest"}
    assert not {"dataset.root", "dataset.download"} & all_options(plain).keys()
    assert differing_options(plain, {**plain, "devices": 2}) == ["devices"]
    assert differing_options({**plain, "sync_norm": True}, {**plain, "sync_norm": True, "devices": 2}) == []


def test_an_option_that_is_gone_is_told(make_plan: Make) -> None:
    plain = make_plan().config.model_dump()
    older = {**plain, "recipe": {**plain["recipe"], "fancy": 3}}
    assert differing_options(plain, older) == ["recipe.fancy, which is no option any more"]
    with pytest.raises(ConfigError, match=r"recipe\.fancy is not a key of the configuration"):
        parse(older)


def test_a_record_is_not_imported(make_plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_norm.py").write_text("raise SystemExit('this was executed')")
    monkeypatch.syspath_prepend(tmp_path)
    plain = {**make_plan().config.model_dump(), "norm": {"_target_": "foreign_norm.Norm", "eps": 1.0}}
    assert set_options(plain)["norm.eps"] == 1


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

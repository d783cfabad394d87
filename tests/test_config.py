"""A configuration is refused before anything starts, or it is right; its name and hash follow from it alone."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from abn_exp.config import option_rows
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan, plan_run
from tests.helpers.runs import REPOSITORY

Make = Callable[..., RunPlan]
CONF = REPOSITORY / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def paired(one: list[str], other: list[str]) -> list[tuple[str, str]]:
    """Return pairs in which each of both is at least once."""
    return [(one[i % len(one)], other[i % len(other)]) for i in range(max(len(one), len(other)))]


@pytest.mark.parametrize(("model", "norm"), paired(options("model"), options("norm")))
def test_every_model_and_every_norm_is_accepted(make_plan: Make, model: str, norm: str) -> None:
    make_plan(f"model={model}", f"norm={norm}", "dataset=cifar100", tiny=False)


@pytest.mark.parametrize(("dataset", "recipe"), paired(options("dataset"), options("recipe")))
def test_every_dataset_and_every_recipe_is_accepted(make_plan: Make, dataset: str, recipe: str) -> None:
    extra = ["dataset.path=somewhere"] if dataset == "folder" else []
    make_plan(f"dataset={dataset}", f"recipe={recipe}", *extra, tiny=False)


def test_full_experiment_is_at_full_size(make_plan: Make) -> None:
    """What makes the embedded set quick leaves no trace in any other."""
    config = make_plan("norm=abn", "dataset=cifar100", tiny=False).config
    assert (config.model["width"], config.recipe.epochs, config.recipe.batch_size) == (3, 200, 256)
    quick = make_plan(tiny=False).config
    assert quick.model["width"] < 1
    assert quick.recipe.epochs < 50


USERS_MODEL = """
from torch import nn

def make(num_classes: int, image_size: int, norm_layer, channels: int = 4, width: int = 1) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, channels * width, 3), norm_layer(channels * width), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(channels * width, num_classes))
"""


@pytest.mark.parametrize("options", [{"channels": 6}, {"width": 2}])
def test_a_users_model_keeps_its_size_on_the_embedded_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """The embedded set makes the models here narrow; one without `width`, or with an integer one, is not."""
    (tmp_path / "users_model.py").write_text(USERS_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    conf = copytree(CONF, tmp_path / "conf")
    text = "_target_: users_model.make\n" + "".join(f"{key}: {value}\n" for key, value in options.items())
    (conf / "model" / "theirs.yaml").write_text(text)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        cfg = compose("config", ["model=theirs", "dataset=digits"], return_hydra_config=True)
        plan = plan_run(cfg, dict(cfg.hydra.runtime.choices))
    assert plan.config.model == {"_target_": "users_model.make", **options}
    assert plan.variant == "fixed"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("recipe.epochs=0", "recipe.epochs=0 is not allowed: it should be greater than 0"),
        ("recipe.epochs=1.5", "recipe.epochs=1.5 is not allowed: it should be a valid integer"),
        ("seed=abc", "seed=abc is not allowed: it should be a valid integer"),
        ("seed=true", "seed=True is not allowed"),
        ("seed=-1", "seed=-1 is not allowed"),
        ("recipe.optimizer.name=adm", "it should be 'adam' or 'sgd'"),
        ("recipe.clip_grad_norm=0", "recipe.clip_grad_norm=0 is not allowed: it should be greater than 0"),
        ("recipe.init=theirs", "recipe.init=theirs is not allowed: it should be 'torch' or 'authors'"),
        ("recipe.clip_latent_range=[0.5,0.5]", "recipe.clip_latent_range=[0.5, 0.5] must begin before it ends"),
        ("recipe.clip_latent_range=[0.5]", "recipe.clip_latent_range=[0.5] is not allowed"),
        ("recipe.clip_latent_range=[0,2]", "recipe.clip_latent_range.1=2 is not allowed: it should be less than or"),
        ("recipe.val_fraction=1", "it should be less than 1"),
        ("recipe.schedule.warmup_epochs=9", "recipe.schedule.warmup_epochs=9 must be less than"),
        ("precision=fp8", "precision=fp8 is not allowed"),
        ("dataset.image_size=30", "dataset.image_size=30 is not allowed"),
        ("dataset.padding=32", "dataset.padding=32 must be less than"),
        ("dataset.path=x", "dataset.path is for dataset=folder"),
        ("model.width=wide", "model.width=wide is not allowed"),
        ("model.width=-1", "width"),
        ("norm.eps=small", "norm.eps=small is not allowed"),
        ("+norm.gamma=1", "norm.gamma is not a key of abn_exp.norm.AttentionBatchNorm2d; it takes"),
        ("+lr=1", "lr is not a key of the configuration"),
        ("norm._target_=abn_exp.norm.Nothing", "cannot be imported"),
        ("+recipe.lr=1", "recipe.lr is not a key of the configuration; did you mean recipe.optimizer.lr?"),
        ("+dataset.rot=x", "dataset.rot is not a key of the configuration; did you mean dataset.root?"),
        ("recipe.schedule=cosine", "recipe.schedule=cosine is not allowed: it is a section; give its keys"),
        ("dataset.name=mnist", "it should be digits, cifar10, cifar100, tinyimagenet or folder"),
        ("name=a/b", "name=a/b is not allowed: it should be letters, digits, '.', '_' and '-', a letter or digit"),
        ("name=quoted", "name=quoted is not allowed: "),
        ("wandb.project=a/b", "wandb.project=a/b is not allowed: it should be text without / \\ # ? % :"),
    ],
)
def test_a_mistake_is_one_sentence(
    make_plan: Make, override: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(override)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not caplog.records  # Hydra's own words on it


@pytest.mark.parametrize("override", ["norm=abm", "recipe.optimizer.lrr=1", "nrom=abn", "optimizer.lr=1"])
def test_hydra_refuses_names_that_do_not_exist(make_plan: Make, override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        make_plan(override)


@pytest.mark.parametrize("key", ["results_dir", "dataset.root", "wandb.dir"])
def test_a_file_where_a_folder_is_to_be_is_told_with_its_key(make_plan: Make, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=rf"{key}={tmp_path}/file/below is not allowed: {tmp_path}/file is a file\."
    ):
        make_plan(f"{key}={tmp_path}/file/below")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "taken").touch()
    with pytest.raises(ConfigError, match=r"name=taken is not allowed: .*/results/taken is a file\."):
        make_plan("name=taken")


@pytest.mark.parametrize(("value", "root"), [("/some/where", "/some/where"), ("", "./data"), (None, "./data")])
def test_an_empty_data_dir_means_unset(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, value: str | None, root: str
) -> None:
    monkeypatch.delenv("DATA_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA_DIR", value)
    assert make_plan().config.dataset.root == root


def test_folder_needs_a_path(make_plan: Make) -> None:
    with pytest.raises(ConfigError, match=r"dataset=folder needs dataset\.path=FOLDER"):
        make_plan("dataset=folder")


def test_same_configuration_same_directory(make_plan: Make) -> None:
    plain = make_plan(tiny=False)
    same = [
        make_plan("recipe.optimizer.lr=1e-3", "norm=abn", tiny=False),
        make_plan("wandb=offline", "device=cpu", "dataset.root=elsewhere", "force=true", "threads=2", tiny=False),
        make_plan(f"model.width={float(plain.config.model['width'])}", tiny=False),
    ]
    for other in same:
        assert other.directory == plain.directory
        assert other.config_hash == plain.config_hash
    assert plain.directory.parts[-6:] == ("runs", "digits", "binarynet", "abn", "fixed", "seed-0")


def test_different_configurations_differ_in_directory_and_hash(make_plan: Make) -> None:
    overrides = [
        "seed=1",
        "norm=bn",
        "norm.momentum=0.9",
        "model=vgg_small",
        "model.width=0.5",
        "model.binarization.pad_value=-1",
        "recipe=strong",
        "recipe.epochs=3",
        "recipe.optimizer.lr=0.01",
        "recipe.clip_grad_norm=1",
        "recipe.clip_latent_range=[0,0.5]",
        "dataset.train_images=300",
        "precision=bf16",
    ]
    plans = [make_plan(tiny=False)] + [make_plan(override, tiny=False) for override in overrides]
    assert len({plan.directory for plan in plans}) == len(plans)
    assert len({plan.config_hash for plan in plans}) == len(plans)
    assert not any("=" in str(plan.directory) for plan in plans)


def test_an_option_of_a_recipe_put_back_to_its_default_is_in_the_name(make_plan: Make) -> None:
    paper = ["recipe=paper", "model=resnet18_paper"]
    published, torchs = make_plan(*paper, tiny=False), make_plan(*paper, "recipe.init=torch", tiny=False)
    assert (published.variant, torchs.variant) == ("paper", "paper_init-torch")
    assert published.config_hash != torchs.config_hash


def test_the_published_start_counts_for_its_network_alone(make_plan: Make) -> None:
    for model, differs in (("binarynet", False), ("resnet18", False), ("resnet18_paper", True)):
        one, other = (make_plan(f"model={model}", f"recipe.init={init}", tiny=False) for init in ("torch", "authors"))
        assert (one.config_hash != other.config_hash) is differs
        assert (one.directory != other.directory) is differs


def test_the_name_tells_what_differs(make_plan: Make) -> None:
    plan = make_plan("recipe.epochs=3", "norm.momentum=0.9", tiny=False)
    assert plan.variant == "fixed_norm.momentum-0.9_epochs-3"


def test_every_option_says_what_it_means_and_in_which_range() -> None:
    rows = {key: (allowed, default, text) for key, allowed, default, text in option_rows()}
    assert not [key for key, (_, _, text) in rows.items() if not text]
    assert rows["recipe.label_smoothing"][0] == "float, >= 0, < 1"
    assert rows["dataset.image_size"][0] == "int, >= 8, <= 1024, multiple of 8"
    assert rows["precision"][:2] == ("fp32 | bf16 | exact16", '"fp32"')
    assert rows["looks"][0] == "list of int, >= 2, <= 1000 or null"
    assert {"recipe.optimizer.lr", "wandb.project", "primary.norm", "seed"} <= rows.keys()

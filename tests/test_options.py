"""Which options of a configuration count, and what is said of those that differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from abn_exp import binarize, models, norm, options
from abn_exp.config import Config, parse
from abn_exp.errors import ConfigError, flat
from abn_exp.identity import RunPlan
from abn_exp.options import all_options, differing_options, set_options

Make = Callable[..., RunPlan]

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


def target(thing: Any) -> dict[str, str]:
    module = "abn_exp.models" if thing.__module__.startswith("abn_exp.models") else thing.__module__
    return {"_target_": f"{module}.{thing.__qualname__}"}


def test_released_defaults_are_what_they_were() -> None:
    found = {key: value for key, value in options._schema_defaults(Config) if options._has_effect(key)}
    assert found == SCHEMA_DEFAULTS, "a new option is added to SCHEMA_DEFAULTS; a default once released stays"
    for thing, expected in SIGNATURE_DEFAULTS:
        found = options._node_defaults(target(thing), "x")
        nested = dict(flat({"x": expected}))
        kept = {key: options._plain_number(nested[key]) for key in nested if not isinstance(nested[key], dict)}
        assert {key: value for key, value in found.items() if key in kept} == kept, thing


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

"""What a configuration may be: types, ranges, cross-checks. Refused here, or not at all.

Hydra composes the YAML files; the classes below say what they may hold. `model` and `norm` are open, so that a
new one needs no change here: their keys are checked against the signature of the class they name.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal, Self, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

# Channel statistics of ImageNet's training images, as torchvision documents them.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ConfigError(ValueError):
    """A configuration that cannot be run; its text is one sentence a line, meant for the person who typed it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DatasetConfig(Section):
    name: Literal["digits", "cifar10", "cifar100", "tinyimagenet", "folder"]
    root: str
    path: str | None
    download: bool
    num_classes: int | None = Field(ge=2)
    image_size: int = Field(ge=8, multiple_of=8)
    mean: list[float] | None
    std: list[PositiveFloat] | None
    flip: bool
    padding: NonNegativeInt
    train_images: PositiveInt | None

    @model_validator(mode="after")
    def path_is_for_folders(self) -> Self:
        if self.name == "folder" and not self.path:
            raise ValueError("dataset=folder needs dataset.path=FOLDER with FOLDER/{train,test}/<class>/<image>")
        if self.name != "folder" and self.path:
            raise ValueError(f"dataset.path is for dataset=folder; {self.name} is looked for in dataset.root")
        if self.padding >= self.image_size:
            raise ValueError(f"dataset.padding={self.padding} must be less than image_size={self.image_size}")
        return self


class OptimizerConfig(Section):
    name: Literal["adam", "sgd"]
    lr: PositiveFloat
    momentum: float = Field(ge=0, lt=1)
    weight_decay: NonNegativeFloat
    rebuild_each_epoch: bool


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "linear"]
    warmup_epochs: NonNegativeInt


class RecipeConfig(Section):
    epochs: PositiveInt
    batch_size: int = Field(ge=2)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    label_smoothing: float = Field(ge=0, lt=1)
    clip_latent_weights: bool
    val_fraction: float = Field(ge=0, lt=1)
    split_seed: NonNegativeInt
    normalization: Literal["dataset", "imagenet"]
    paired_init: bool
    test_every_epoch: bool

    @model_validator(mode="after")
    def warmup_ends(self) -> Self:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"recipe.schedule.warmup_epochs={self.schedule.warmup_epochs} must be less than "
                f"recipe.epochs={self.epochs}"
            )
        return self


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: str = Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    entity: str | None
    dir: str


class Config(Section):
    """One run: a cell (dataset, model, norm, recipe, precision) with one seed, and how to run it."""

    dataset: DatasetConfig
    model: dict[str, Any]
    norm: dict[str, Any]
    recipe: RecipeConfig
    wandb: WandbConfig
    seed: NonNegativeInt
    precision: Literal["fp32", "bf16"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    question: str | None
    results_dir: str = Field(min_length=1)
    force: bool
    device: Literal["auto", "cpu", "cuda"]
    devices: PositiveInt
    threads: PositiveInt
    deterministic: bool
    progress: Literal["auto", "bar", "lines"]


def science(plain: dict[str, Any]) -> dict[str, Any]:
    """Return what decides a run's result apart from its seed, as a flat dictionary with dotted keys.

    Where the data lies, the device, W&B and the like are left out; 3 and 3.0 are the same number.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{path}.{key}" if path else key)
        else:
            flat[path] = int(value) if isinstance(value, float) and value.is_integer() else value

    walk({key: plain[key] for key in ("dataset", "model", "norm", "recipe", "precision")}, "")
    return {key: value for key, value in flat.items() if key not in ("dataset.root", "dataset.download")}


def config_hash(config: Config) -> str:
    """Return twelve hexadecimal digits that differ where the science or the seed does."""
    text = json.dumps({**science(config.model_dump()), "seed": config.seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(cfg: DictConfig) -> Config:
    """Return the checked form of what Hydra composed.

    Raises ConfigError with one sentence for each mistake.
    """
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        plain = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(dict(item)) for item in error.errors())) from error
    _check_call(config.norm, "norm")
    _check_call(config.model, "model")
    _check_network(config)
    return config


def _sentence(error: dict[str, Any]) -> str:
    """One mistake that pydantic found, in one sentence with the key and the value as they were typed."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key of the configuration; `python train.py --cfg job` lists them all."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return f"{message}."
    return f"{key}={error['input']} is not allowed: it {message}."


def _check_call(node: dict[str, Any], path: str) -> None:
    """Check the keys and values of a `_target_` node against the signature of what it names."""
    target = get_object_or_explain(node, path)
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters = inspect.signature(target).parameters
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in parameters:
            allowed = ", ".join(name for name in parameters if name != "self")
            raise ConfigError(f"{path}.{key} is not a key of {node['_target_']}; it takes {allowed}.")
        if isinstance(value, dict) and "_target_" in value:
            _check_call(value, f"{path}.{key}")
        elif key in hints:
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(
                    value
                )
            except ValidationError as error:
                item = dict(error.errors()[0])
                raise ConfigError(_sentence({**item, "loc": (path, key), "input": value})) from error


def get_object_or_explain(node: dict[str, Any], path: str) -> Callable[..., Any]:
    """Return the class or function that a `_target_` names."""
    try:
        return get_object(node["_target_"])
    except KeyError as error:
        raise ConfigError(f"{path} needs a _target_, the class or function that makes it.") from error
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}._target_={node['_target_']} cannot be imported.") from error


def _check_network(config: Config) -> None:
    """Build the network without memory, so that whatever its parts refuse is refused before anything starts."""
    with torch.device("meta"):
        build_network(config.model, config.norm, config.dataset.num_classes or 2, config.dataset.image_size)


def build_network(model: dict[str, Any], norm: dict[str, Any], num_classes: int, image_size: int) -> torch.nn.Module:
    """Return the network that the groups `model` and `norm` describe.

    Raises ConfigError where a part refuses its arguments.
    """
    try:
        norm_layer = instantiate(norm, _convert_="all")
        return instantiate(
            model, num_classes=num_classes, image_size=image_size, norm_layer=norm_layer, _convert_="all"
        )
    except InstantiationException as error:
        cause = error.__cause__
        raise ConfigError(str(cause if cause is not None else error).splitlines()[0]) from error

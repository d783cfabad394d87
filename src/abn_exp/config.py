"""What a configuration may be: types, ranges, cross-checks. Refused here, or not at all.

Hydra composes the YAML files; the classes below say what they may hold. `model` and `norm` are open, so that a
new one needs no change here: their keys are checked against the signature of the class they name.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from textwrap import shorten
from typing import Annotated, Any, Literal, Self, get_type_hints

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
    field_validator,
    model_validator,
)
from torch.nn.modules.batchnorm import _NormBase

from abn_exp.norm import check_statistics

# Channel statistics of ImageNet's training images, as torchvision documents them.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_PARAMETERS = 2 * 10**9  # more than any network here can use; less than what ends a machine

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # what may be a folder's name


class ConfigError(ValueError):
    """A configuration that cannot be run; its text is one sentence a line, meant for the person who typed it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DatasetConfig(Section):
    name: Literal["digits", "cifar10", "cifar100", "tinyimagenet", "folder"]
    root: str
    path: str | None
    download: bool
    num_classes: int | None = Field(ge=2)
    image_size: int = Field(ge=8, le=1024, multiple_of=8)
    mean: list[float] | None = Field(min_length=3, max_length=3)
    std: list[PositiveFloat] | None = Field(min_length=3, max_length=3)
    flip: bool
    padding: NonNegativeInt
    train_images: PositiveInt | None

    @model_validator(mode="after")
    def path_is_for_folders(self) -> Self:
        if self.name == "folder" and not self.path:
            raise ValueError("dataset=folder needs dataset.path=FOLDER with FOLDER/{train,test}/<class>/<image>")
        if self.name != "folder" and self.path:
            raise ValueError(f"dataset.path is for dataset=folder; {self.name} is looked for in dataset.root")
        if (self.mean is None) != (self.std is None):
            raise ValueError("dataset.mean and dataset.std go together: give both, or null for both")
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
    epochs: int = Field(gt=0, le=100_000)
    batch_size: int = Field(ge=2)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    label_smoothing: float = Field(ge=0, lt=1)
    clip_latent_weights: bool
    val_fraction: float = Field(ge=0, lt=1)
    split_seed: Seed
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
    seed: Seed
    precision: Literal["auto", "fp32", "bf16", "exact16"]
    name: str = Field(pattern=NAME, max_length=80)
    question: str | None
    results_dir: str = Field(min_length=1)
    force: bool
    device: Literal["auto", "cpu", "cuda"]
    devices: int = Field(gt=0, le=1024)
    sync_norm: bool = False
    compile: bool = False
    threads: int = Field(gt=0, le=1024)
    seeds_at_once: int | str = 1
    deterministic: bool
    progress: Literal["auto", "bar", "lines"]

    @field_validator("seeds_at_once", mode="before")
    @classmethod
    def auto_or_a_number(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and 1 <= value <= 1024):
            raise ValueError(f"seeds_at_once={value} is not allowed: it should be auto, or a number from 1 to 1024")
        return value

    @model_validator(mode="after")
    def devices_share_batches(self) -> Self:
        if self.devices > 1 and (self.recipe.batch_size % self.devices or self.recipe.batch_size < 2 * self.devices):
            raise ValueError(
                f"recipe.batch_size={self.recipe.batch_size} must be a multiple of devices={self.devices}, "
                "with two images or more for each"
            )
        if self.devices > 1 and self.compile:
            raise ValueError(f"compile=true is for devices=1, not for devices={self.devices}; use compile=false")
        return self


def science(plain: dict[str, Any]) -> dict[str, Any]:
    """Return what decides a run's result apart from its seed, as a flat dictionary with dotted keys.

    Where the data lies, the device, W&B and the like are left out; 3 and 3.0 are the same number. The number of
    devices counts only where each normalises its share of a batch by itself.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{path}.{key}" if path else key)
        else:
            flat[path] = int(value) if isinstance(value, float) and value.is_integer() else value

    walk({key: plain[key] for key in ("dataset", "model", "norm", "recipe", "precision")}, "")
    if plain.get("devices", 1) > 1 and not plain.get("sync_norm", False):
        flat["devices"] = plain["devices"]
    if plain.get("compile", False):
        flat["compile"] = True
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
        raise ConfigError(f"{str(error).splitlines()[0]}; give every key a value of its own.") from error
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        sentences = [_sentence(dict(item)) for item in error.errors()]
        more = [f"{len(sentences) - 4} more keys should be mended."] if len(sentences) > 5 else []
        raise ConfigError("\n".join([*sentences[:4], *more] if more else sentences)) from error
    _check_text(plain, "")
    _check_network(config)
    return config


def _check_text(value: Any, path: str) -> None:
    """Refuse control characters, which no file's name and no line of a log can hold."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_text(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, str) and path != "question" and any(ord(character) < 32 for character in value):
        raise ConfigError(f"{path}={value!r} is not allowed: it should be text without control characters.")


def in_a_line(error: Exception) -> str:
    """Return what Hydra, OmegaConf or YAML says of a wrong command line or file, without its search path."""
    return " ".join(str(error).split("\nConfig search path")[0].split())


def _sentence(error: dict[str, Any]) -> str:
    """One mistake that pydantic found, in one sentence with the key and the value as they were typed."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; every key of the configuration needs a value."
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key of the configuration; `python train.py --cfg job` lists them all."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return f"{message}."
    return f"{key}={shorten(str(error['input']), 80)} is not allowed: it {message}."


def _check_call(node: Any, path: str, result: Any, given: Collection[str] = ()) -> None:
    """Check a `_target_` node, before anything that it names is called.

    `result` is what it is to make: a class, or None where that is for its caller to see. `given` are the arguments
    that the program itself will pass. A configuration may come from elsewhere, together with a trained network, so
    that nothing is called but classes of the kind that is needed and functions that take a network's arguments.
    """
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path}={node!r} is not allowed: it should have a _target_, the class or function to call."
        )
    target, name = get_object_or_explain(node, path), node["_target_"]
    if result is not None and not (inspect.isclass(target) and issubclass(target, result)):
        raise ConfigError(f"{path}._target_={name} is not allowed: it should be a subclass of {result.__qualname__}.")
    try:
        parameters = inspect.signature(target).parameters
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (ValueError, TypeError, NameError) as error:
        raise ConfigError(f"{path}._target_={name} is not allowed: its arguments are not known.") from error
    if result is None and (missing := [key for key in given if key not in parameters]):
        raise ConfigError(f"{path}._target_={name} is not allowed: it should take {', '.join(missing)}.")
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in parameters or key in given:
            allowed = ", ".join(parameter for parameter in parameters if parameter not in ("self", *given))
            raise ConfigError(f"{path}.{key} is not a key of {name}; it takes {allowed}.")
        hint = hints.get(key)
        if isinstance(value, dict) and "_target_" in value:
            if not inspect.isclass(hint):
                raise ConfigError(f"{path}.{key} is not allowed: {name} does not say which class it takes there.")
            _check_call(value, f"{path}.{key}", hint)
        elif key in hints:
            try:
                TypeAdapter(hints[key], config=None if is_dataclass(hint) else _CALL).validate_python(value)
            except ValidationError as error:
                item = dict(error.errors()[0])
                raise ConfigError(_sentence({**item, "loc": (path, key), "input": value})) from error


_CALL = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def get_object_or_explain(node: dict[str, Any], path: str) -> Callable[..., Any]:
    """Return the class or function that a `_target_` names."""
    try:
        return get_object(node["_target_"])
    except KeyError as error:
        raise ConfigError(f"{path} needs a _target_, the class or function that makes it.") from error
    except Exception as error:  # importing is running: there is no end to what it may raise
        raise ConfigError(
            f"{path}._target_={node['_target_']} cannot be imported: it should be package.module.Name."
        ) from error


def _check_network(config: Config) -> None:
    """Build the network without memory, so that whatever its parts refuse is refused before anything starts."""
    with torch.device("meta"):
        classes = config.dataset.num_classes
        network = build_network(
            config.model, config.norm, classes if classes is not None else 2, config.dataset.image_size
        )
    if (count := sum(parameter.numel() for parameter in network.parameters())) > MAX_PARAMETERS:
        raise ConfigError(
            f"this network has {count:,} parameters; choose a smaller model.width or dataset.image_size."
        )


GIVEN = ("num_classes", "image_size", "norm_layer")  # what the program passes to a network


def build_network(model: dict[str, Any], norm: dict[str, Any], num_classes: int, image_size: int) -> torch.nn.Module:
    """Return the network that the groups `model` and `norm` describe.

    Raises ConfigError where a part refuses its arguments, or is not a part of a network.
    """
    _check_call(norm, "norm", torch.nn.Module, ("num_features", "device", "dtype"))
    _check_call(model, "model", None, GIVEN)
    if norm.get("_partial_") is not True or model.get("_partial_", False) is not False:
        raise ConfigError("norm._partial_ should be true and model._partial_ absent: a network makes its norms.")
    try:
        norm_layer = instantiate(norm, _convert_="all")
        network = instantiate(
            model, num_classes=num_classes, image_size=image_size, norm_layer=norm_layer, _convert_="all"
        )
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__
        raise ConfigError(str(cause if cause is not None else error).splitlines()[0]) from error
    if not isinstance(network, torch.nn.Module):
        raise ConfigError(f"model._target_={model['_target_']} is not allowed: it does not make a torch.nn.Module.")
    for module in network.modules():
        if isinstance(module, _NormBase):
            try:
                check_statistics(module.eps, module.momentum)
            except ValueError as error:
                raise ConfigError(f"norm: {error}") from error
    return network

"""Schema of the configuration: types, ranges and cross-checks. A wrong value is refused here, before a run starts.

Hydra composes the YAML files; the classes below say what they may hold. `model` and `norm` are open, so that a
new one needs no change here: their keys are checked against the signature of the class they name.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from abn_exp.errors import ConfigError, end_with_reader, flat, flat_keys, validation_sentence

# Channel statistics of ImageNet's training images, as torchvision documents them.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_PARAMETERS = 2 * 10**9  # more than any network here can use; less than what ends a machine

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # what may be a folder's name


def _matching(pattern: str, allowed: str) -> AfterValidator:
    """Return a check of text against a pattern that says in words what is allowed."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("text", f"Input should be {allowed}")
        return value

    return AfterValidator(check)


class NoEffect:
    """Marks an option that cannot change what a run finds, in `Annotated`: it is in neither name nor hash."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DatasetConfig(Section):
    name: str = Field(description="a name in the catalog, or folder for images of your own")
    root: Annotated[str, NoEffect] = Field(description="folder of the converted files and the original archives")
    path: str | None = Field(None, description="dataset=folder: the folder that holds {train,test}/<class>/<image>")
    download: Annotated[bool, NoEffect] = Field(description="whether the original may be downloaded")
    num_classes: int | None = Field(ge=2, description="number of classes; null: counted")
    image_size: int = Field(ge=8, le=1024, multiple_of=8, description="pixels a side of an image")
    mean: list[float] | None = Field(
        min_length=3, max_length=3, description="of the red, green and blue of pixels in [0, 1]; null: measured"
    )
    std: list[PositiveFloat] | None = Field(
        min_length=3, max_length=3, description="of the red, green and blue of pixels in [0, 1]; null: measured"
    )
    flip: bool = Field(description="whether half of the training images are mirrored, in each epoch others")
    padding: NonNegativeInt = Field(description="black pixels on each side before the random crop; 0: no crop")
    train_images: PositiveInt | None = Field(
        None, description="training images to use, the same share of each class; null: all"
    )
    images: list[PositiveInt] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="numbers of training and test images; filled in where they are not the catalog's",
    )

    @property
    def source(self) -> dict[str, Any]:
        """What `data.prepare.load` takes to find the set."""
        return self.model_dump(include={"name", "root", "path", "image_size", "num_classes", "download"})

    @field_validator("name")
    @classmethod
    def in_the_catalog(cls, name: str) -> str:
        from abn_exp.data.catalog import CATALOG  # numpy and PIL; not for --help

        if name not in (*CATALOG, "folder"):
            raise ValueError(
                f"dataset.name={name} is not allowed: it should be {', '.join(CATALOG)} or folder; a new set "
                "needs an entry in CATALOG (CONTRIBUTING.md)"
            )
        return name

    @field_validator("root")
    @classmethod
    def empty_is_unset(cls, root: str) -> str:
        """Take an empty DATA_DIR= for none."""
        return root or "./data"

    @model_validator(mode="after")
    def keys_agree(self) -> Self:
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
    """`name`, or any class of torch.optim as `_target_`; further keys are its arguments (`build_optimizer`)."""

    model_config = ConfigDict(extra="allow")

    name: Literal["adam", "sgd"] | None = Field(None, description="short name; or _target_=torch.optim.CLASS")
    lr: PositiveFloat = Field(description="learning rate, which the schedule multiplies")
    momentum: float = Field(ge=0, lt=1, description="of sgd and other classes that have one")
    weight_decay: NonNegativeFloat = Field(description="as the optimizer's class defines it")
    rebuild_each_epoch: bool = Field(description="whether the optimizer's state is discarded at each epoch's start")

    @model_validator(mode="before")
    @classmethod
    def one_of_name_and_target(cls, value: Any) -> Any:
        """Leave out whichever of the two does not decide, so that it is in no record and no run's name."""
        if isinstance(value, dict):
            unused = "_target_" if value.get("_target_") is None else "name"
            value = {key: item for key, item in value.items() if key != unused}
            if value.get("name", "") is None:
                raise ValueError("recipe.optimizer needs a name, adam or sgd, or a class of torch.optim as _target_")
        return value

    @model_serializer(mode="wrap")
    def without_an_unused_name(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if (key, value) != ("name", None)}


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "linear"] = Field(description="learning rate over the steps")
    warmup_epochs: NonNegativeInt = Field(description="epochs in which the learning rate rises linearly to lr")


class RecipeConfig(Section):
    epochs: int = Field(gt=0, le=100_000, description="passes over the training images")
    batch_size: int = Field(ge=2, description="images of a step, over all devices")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    label_smoothing: float = Field(ge=0, lt=1, description="share of the label that is spread over all classes")
    clip_grad_norm: PositiveFloat | None = Field(None, description="largest 2-norm of all gradients; null: none")
    init: Literal["torch", "authors"] = Field("torch", description="initial weights of resnet18_paper")
    clip_latent_weights: bool = Field(description="whether latent weights are clipped to [-1, 1] after a step")
    clip_latent_range: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 1.0], min_length=2, max_length=2, description="where clipping begins and ends, as shares of all steps"
    )
    val_fraction: float = Field(ge=0, lt=1, description="share of the training images held out for validation")
    split_seed: Seed = Field(description="seed of the training/validation split, the same for every seed of a run")
    normalization: Literal["dataset", "imagenet"] = Field(description="whose channel means and stds")
    paired_init: bool = Field(description="whether the norms of a seed start from the same weights")
    test_every_epoch: bool = Field(description="whether the test set is evaluated each epoch, and the peak recorded")

    @model_validator(mode="after")
    def schedules_end(self) -> Self:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"recipe.schedule.warmup_epochs={self.schedule.warmup_epochs} must be less than "
                f"recipe.epochs={self.epochs}"
            )
        start, end = self.clip_latent_range
        if start >= end:
            raise ValueError(f"recipe.clip_latent_range={self.clip_latent_range} must begin before it ends")
        return self


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(description="auto: online with a key")
    project: Annotated[str, _matching(r"[^/\\#?%:]+", r"text without / \ # ? % :")] = Field(
        "abn_exp", max_length=128, description="W&B project"
    )
    entity: str | None = Field(None, description="team or user; null: that of the key")
    dir: str = Field(".", description="folder below which W&B writes its own files, in wandb/")
    group: str | None = Field(None, description="W&B group; null: the study and the cell")
    tags: list[str] = Field([], description="added to data set, model and norm")
    notes: str | None = Field(None, description="notes of the W&B run")
    log_model: bool = Field(False, description="whether weights and reports are logged as artifacts")

    @model_validator(mode="before")
    @classmethod
    def empty_is_unset(cls, values: Any) -> Any:
        """Leave out what is empty, as an empty WANDB_PROJECT= is."""
        return {key: value for key, value in values.items() if value != ""} if isinstance(values, dict) else values

    @field_validator("tags", mode="before")
    @classmethod
    def split_at_commas(cls, value: Any) -> Any:
        return [tag for part in value.split(",") if (tag := part.strip())] if isinstance(value, str) else value


class PrimaryConfig(Section):
    """The comparison that a study was made for; `null` data sets and models are all of the study.

    `mean` and `spread` ask in each cell for the difference of means and the ratio of stds, `pooled` asks for one
    difference over all cells, each seed averaged over them first.
    """

    norm: str = Field(description="the norm in question")
    reference: str = Field(default="bn", description="the norm that it is compared with")
    datasets: list[str] | None = Field(
        default=None, description="data sets that are compared; null: all of the study"
    )
    models: list[str] | None = Field(default=None, description="networks that are compared; null: all of the study")
    statistic: Literal["mean", "pooled", "spread"] = Field(default="mean", description="what is compared")

    @model_validator(mode="after")
    def two_norms(self) -> Self:
        if self.norm == self.reference:
            raise ValueError(f"primary.norm={self.norm} is primary.reference, too; name two norms")
        return self


class Config(Section):
    """One run: a cell (dataset, model, norm, recipe, precision) with one seed, and how to run it."""

    dataset: DatasetConfig
    model: dict[str, Any] = Field(description="_target_ and arguments of the function that makes the network")
    norm: dict[str, Any] = Field(description="_target_ and arguments of the norm's class")
    recipe: RecipeConfig
    wandb: Annotated[WandbConfig, NoEffect]
    # counted apart: a cell has several
    seed: Annotated[Seed, NoEffect] = Field(description="initial weights, order of the images, crops and flips")
    precision: Literal["fp32", "bf16", "exact16"] = Field("fp32", description="arithmetic of training")
    name: Annotated[
        str,
        NoEffect,
        _matching(f"(?!quoted$){NAME}", "letters, digits, '.', '_' and '-', a letter or digit first; not 'quoted'"),
    ] = Field(max_length=80, description="first folder below results_dir; a study sets its own")
    question: Annotated[str | None, NoEffect] = Field(None, description="what a study asks, in words")
    primary: Annotated[PrimaryConfig | None, NoEffect] = None
    delta: Annotated[PositiveFloat, NoEffect] = Field(
        0.5, description="smallest difference of interest, in percentage points of test accuracy"
    )
    looks: Annotated[list[Annotated[int, Field(ge=2, le=1000)]] | None, NoEffect] = Field(
        None, min_length=1, description="numbers of seeds at which the comparison is tested, ascending"
    )
    spending: Annotated[Literal["obrien_fleming", "pocock"], NoEffect] = Field(
        "obrien_fleming", description="how the error probability is spent over the looks"
    )
    results_dir: Annotated[str, NoEffect] = Field(min_length=1, description="folder of all results")
    force: Annotated[bool, NoEffect] = Field(description="whether a finished run is trained again from the start")
    dry_run: Annotated[bool, NoEffect] = Field(
        False, description="whether runs are only listed, with estimates of time and disk"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], NoEffect] = Field(description="auto: cuda where torch sees one")
    devices: int = Field(1, gt=0, le=1024, description="devices that one run trains on (DDP)")
    sync_norm: Annotated[bool, NoEffect] = Field(
        False, description="devices > 1: whether batch statistics are those of the whole batch"
    )
    compile: bool = Field(False, description="whether the network is compiled (torch.compile)")
    threads: Annotated[int, NoEffect] = Field(gt=0, le=1024, description="CPU threads of a run")
    seeds_at_once: Annotated[int | str, NoEffect] = Field(
        1, description="runs of a multirun trained at a time, 1 to 1024; auto: as many as are fastest"
    )
    deterministic: Annotated[bool, NoEffect] = Field(description="whether only deterministic kernels are used")
    progress: Annotated[Literal["auto", "bar", "lines"], NoEffect] = Field(
        description="a progress bar, or a line an epoch; auto: a bar on a terminal"
    )
    keep: Annotated[Literal["weights", "all"], NoEffect] = Field(
        "weights", description="what is kept of a finished run's checkpoints; all: also the optimizer's state"
    )
    # the weights count, not where they lie
    init_from: Annotated[str | None, NoEffect] = Field(
        None, min_length=1, description="folder of a run (.../seed-0) whose last weights are the initial ones"
    )
    init_digest: str | None = Field(None, description="digest of the weights in init_from; found at the start")
    init_cell: Annotated[str | None, NoEffect] = Field(
        None, description="names the weights in init_from where each seed has its own; found at the start"
    )

    @field_validator("seeds_at_once", mode="before")
    @classmethod
    def auto_or_a_number(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and 1 <= value <= 1024):
            raise ValueError(f"seeds_at_once={value} is not allowed: it should be auto, or a number from 1 to 1024")
        return value

    @field_validator("looks")
    @classmethod
    def looks_increase(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"looks={value} must increase: they are numbers of seeds")
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


def published_start_differs(plain: Mapping[str, Any]) -> bool:
    """Return whether `recipe.init` matters: only the published start of `resnet18_paper` is not torch's."""
    model = plain.get("model")
    target = model.get("_target_") if isinstance(model, Mapping) else None
    return target in ("abn_exp.models.resnet18_paper", "abn_exp.models.resnet.resnet18_paper")


def option_rows() -> list[tuple[str, str, str, str]]:
    """Return each option's key, allowed values, default ("" where a file in conf/ sets it) and description."""
    schema = Config.model_json_schema()
    return list(_option_rows(schema, schema["$defs"], ""))


def _option_rows(
    node: Mapping[str, Any], sections: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in node["properties"].items():
        kinds = field.get("anyOf", [field])
        if inner := [sections[kind["$ref"].rpartition("/")[2]] for kind in kinds if "$ref" in kind]:
            yield from _option_rows(inner[0], sections, f"{path}{name}.")
        else:
            default = json.dumps(field["default"]) if "default" in field else ""
            yield f"{path}{name}", " or ".join(map(_allowed, kinds)), default, field.get("description", "")


def _allowed(kind: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "enum" in kind:
        return " | ".join(map(str, kind["enum"]))
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "true | false", "object": "keys"}
    text = f"list of {_allowed(kind['items'])}" if kind["type"] == "array" else names.get(kind["type"], kind["type"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds["multipleOf"] = "multiple of"
    return ", ".join([text, *(f"{sign} {kind[key]:.10g}" for key, sign in bounds.items() if key in kind)])


def read(cfg: DictConfig) -> Config:
    """Return the checked form of what Hydra composed.

    Raises ConfigError with one sentence for each mistake.
    """
    config, plain = _checked(cfg, Config, [str(key) for key in cfg if key != "hydra"])
    _check_text(plain)
    _check_folders(config)
    _check_parts(config)
    return config


def read_dataset(cfg: DictConfig) -> DatasetConfig:
    """Return the checked form of the section `dataset` alone. Raises ConfigError as `read` does."""
    return _checked(cfg, _DatasetOnly, ["dataset"])[0].dataset


class _DatasetOnly(Section):
    dataset: DatasetConfig


S = TypeVar("S", bound=Section)


def _checked(cfg: DictConfig, schema: type[S], keys: list[str]) -> tuple[S, Any]:
    """Return some keys of what Hydra composed as the schema has them, and plain."""
    try:
        plain = {key: _plain(cfg[key]) for key in keys}
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; give every key a value of its own.") from error
    return _validated(plain, schema), plain


def _plain(value: Any) -> Any:
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


def parse(plain: Any) -> Config:
    """Return the checked form of a plain configuration, e.g. a recorded one; its network is not built.

    Raises ConfigError with one sentence for each mistake.
    """
    return _validated(plain, Config)


def _validated(plain: Any, schema: type[S]) -> S:
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        sentences = [validation_sentence(dict(item), flat_keys(plain)) for item in error.errors()]
        more = [f"{len(sentences) - 4} more keys are wrong."] if len(sentences) > 5 else []
        raise ConfigError("\n".join([*sentences[:4], *more] if more else sentences)) from error


def _check_text(plain: Any) -> None:
    """Refuse control characters, which no file's name and no line of a log can hold."""
    for key, value in flat(plain):
        if isinstance(value, str) and key != "question" and any(ord(character) < 32 for character in value):
            raise ConfigError(f"{key}={value!r} is not allowed: it should be text without control characters.")


def _check_folders(config: Config) -> None:
    """Refuse a file where a folder is to be."""
    folders = {
        "results_dir": config.results_dir,
        "name": os.path.join(config.results_dir, config.name),
        "dataset.root": config.dataset.root,
        "wandb.dir": config.wandb.dir,
    }
    for key, folder in folders.items():
        path = Path(folder).expanduser()
        if file := next((str(path) for path in (path, *path.parents) if path.exists() and not path.is_dir()), None):
            raise ConfigError(f"{key}={config.name if key == 'name' else folder} is not allowed: {file} is a file.")


def _check_parts(config: Config) -> None:
    """Build the network, on the meta device, and the optimizer: errors of theirs come before anything starts."""
    classes = config.dataset.num_classes if config.dataset.num_classes is not None else 2
    parts = config.model, config.norm, config.recipe.optimizer.model_dump()
    _check_built(*map(json.dumps, parts), classes, config.dataset.image_size)


@lru_cache(maxsize=256)  # the runs of a sweep have few different ones
def _check_built(model: str, norm: str, optimizer: str, classes: int, image_size: int) -> None:
    import torch  # takes seconds: only once all other values have been found right

    from abn_exp.models.build import build_network
    from abn_exp.optimizer import check_optimizer

    check_optimizer(json.loads(optimizer))
    with torch.device("meta"):
        network = build_network(json.loads(model), json.loads(norm), classes, image_size)
    if (count := sum(parameter.numel() for parameter in network.parameters())) > MAX_PARAMETERS:
        raise ConfigError(
            f"this network has {count:,} parameters; choose a smaller model.width or dataset.image_size."
        )


if __name__ == "__main__":
    end_with_reader()
    for key, allowed, default, description in option_rows():
        print(f"{key}: {allowed}{f', default {default}' if default else ''}\n    {description}")

"""Which options decide a run's result: its identity, and the hash, the names and the folder that follow from it.

A run's identity is its seed, its chosen groups (data set, network, norm, recipe) and every option that is not at its
default. The default of an option is the value that it has in the schema (`config`), or, for an option of a network or
a norm, in the signature of the class or function that `_target_` names, when nothing sets it. What a file in `conf/`
sets counts as set. So

- a new option at its default changes no hash, no folder's name and no comparison, and older records, which do not
  have it, are read as having it at its default;
- a default, once released, never changes (`tests/test_identity.py` holds them);
- a file in `conf/` that is changed describes another configuration, which is refused in the folder of the old one;
- an option without a default is always counted, and so is one that a record has and the schema no longer knows.

Options that cannot change a result are marked `NoEffect` in the schema. A hash is computed from the configuration,
never taken from a record. The folder's name shows in what a run differs from its groups' own options; a cell that was
recorded before, under the name that an earlier version gave it, keeps that name.
"""

import hashlib
import importlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from abn_exp.config import NAME, Config, NoEffect, options_without_effect, read
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.files import writing
from abn_exp.records import RECORDS, RUN_FILES, archived_runs, read_run_file
from abn_exp.results import has_begun, read_config, read_result

log = logging.getLogger(__name__)

GROUPS = ("dataset", "model", "norm", "recipe")
OWN_PACKAGES = ("abn_exp", "torch")  # whose modules may be imported for their signatures alone

Options = dict[str, Any]  # by dotted key


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration and the names that follow from it."""

    config: Config
    choices: dict[str, str]  # dataset, model, norm, recipe: the chosen option of each group
    variant: str  # the recipe and whatever else was overridden

    @property
    def cell(self) -> str:
        """The cell's name, e.g. "cifar10-resnet18-abn-fixed"."""
        return "-".join([*(self.choices[group] for group in ("dataset", "model", "norm")), self.variant])

    @property
    def study(self) -> Path:
        """The folder of all runs with this name."""
        return Path(self.config.results_dir, self.config.name)

    @property
    def directory(self) -> Path:
        parts = [self.choices[group] for group in ("dataset", "model", "norm")]
        return Path(self.study, *parts, self.variant, f"seed-{self.config.seed}")

    @property
    def config_hash(self) -> str:
        """Twelve hexadecimal digits of the identity."""
        identity = {**self.choices, **set_options(self.config.model_dump()), "seed": self.config.seed}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def plan_run(cfg: DictConfig, choices: dict[str, str]) -> RunPlan:
    """Check a composed configuration and name its cell: the recipe, and whatever differs from the groups' own.

    Raises ConfigError with one sentence for each mistake.
    """
    config = _with_weights(_with_images(read(cfg)))
    choices = {group: choices[group] for group in GROUPS}
    for group, choice in choices.items():
        if not re.fullmatch(NAME, choice):  # it becomes a folder's name
            raise ConfigError(f"{group}={choice} is not allowed: it should be the name of a file in conf/{group}.")
    own = _own_options(GlobalHydra.instance().config_loader(), tuple(choices.items()))
    ours, everything = set_options(config.model_dump()), all_options(config.model_dump())
    changes = {key: everything.get(key) for key in ours.keys() | own.keys() if ours.get(key) != own.get(key)}
    variant = variant_name(choices["recipe"], changes)
    return RunPlan(config, choices, _recorded_variant(RunPlan(config, choices, variant)) or variant)


@lru_cache(maxsize=1024)  # composing takes a quarter of a second, and a sweep has hundreds of runs
def _own_options(loader: object, choices: tuple[tuple[str, str], ...]) -> Options:
    """Return the options that the files of the chosen groups set; `loader` stands for where these files are."""
    composed = compose("config", [f"{group}={choice}" for group, choice in choices])
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return set_options({str(key): value for key, value in plain.items()})


def _with_images(config: Config) -> Config:
    """Set `dataset.images` where the set at hand has not as many as the catalog says: it is another data set."""
    from abn_exp.data.catalog import CATALOG
    from abn_exp.data.prepare import count_images

    options = config.dataset
    if options.images is not None or options.name not in CATALOG:
        return config
    held = count_images(options.name, options.root, options.image_size, options.num_classes)
    if held in (None, (CATALOG[options.name].train_count, CATALOG[options.name].test_count)):
        return config
    return config.model_copy(update={"dataset": options.model_copy(update={"images": list(held or ())})})


def _with_weights(config: Config) -> Config:
    """Set `init_digest`, which counts instead of the place where the initial weights lie."""
    digest = None
    if config.init_from is not None:
        from abn_exp.warm_start import initial_weights_digest  # torch, which takes seconds to import

        digest = initial_weights_digest(config)
    return config.model_copy(update={"init_digest": digest})


def variant_name(recipe: str, changes: Mapping[str, Any]) -> str:
    """Return the folder name of a recipe with overrides: ``fixed_epochs-3_model.width-1``.

    ``changes`` maps dotted keys to the values in which a configuration differs from its groups' own. A name
    that had to lose something (a character, its end) carries a digest of all changes, so that no two are equal.
    """
    parts = [recipe]
    for key, value in sorted(changes.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key.removeprefix('recipe.')}-{text}")
    full = "_".join(parts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", full)[:160]
    if name != full:
        name = f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"
    return name


def all_options(plain: Mapping[str, Any], *, signatures: bool = True) -> Options:
    """Return every option of a configuration that can change a result: as it is set, or else at its default.

    `plain` may be an older record, without some of today's options or with some that are gone. 3 and 3.0 are the same
    number. `signatures` says whether to fill in the defaults of a network and a norm, which imports them.
    """
    options = _defaults(plain, signatures) | {key: value for key, value in _flat(plain) if _has_effect(key)}
    return {key: value for key, value in options.items() if key not in options_without_effect(plain)}


def set_options(plain: Mapping[str, Any]) -> Options:
    """Return those of all_options that are not at their default."""
    defaults = _defaults(plain, signatures=True)
    return {k: v for k, v in all_options(plain).items() if k not in defaults or defaults[k] != v}


def differing_options(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys of the options in which two configurations differ; of one that is gone, say so."""
    own, other = set_options(ours), set_options(theirs)
    known = _defaults(ours, signatures=True).keys() | own.keys()
    different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    return [key if key in known else f"{key}, which is no option any more" for key in different]


def _recorded_variant(plan: RunPlan) -> str | None:
    """Return the folder's name under which the plan's cell was recorded before, or None where it was not."""
    ours = set_options(plan.config.model_dump())
    recipe = plan.choices["recipe"]
    for study in (plan.study, quoted(plan.study)):
        parent = Path(study, *(plan.choices[group] for group in ("dataset", "model", "norm")))
        if (parent / plan.variant).is_dir():
            return plan.variant
        seen = set()
        for directory in _run_directories(parent):
            variant = directory.parent.name
            if variant in seen or variant.split("_")[0] != recipe.split("_")[0] or not variant.startswith(recipe):
                continue
            seen.add(variant)
            try:
                if set_options(read_config(directory)) == ours:
                    return variant
            except (DamagedFile, OSError):
                continue
    return None


def _run_directories(folder: Path) -> Iterator[Path]:
    yield from (path.parent for path in sorted(folder.glob("*/seed-*/config.yaml")))
    try:
        yield from archived_runs(folder)
    except DamagedFile as error:
        log.warning("%s; its runs are not taken as finished", error)


def restore_quoted(plan: RunPlan) -> Path | None:
    """Write the record of a run that was quoted into the run's own folder, and return the archive that it is from.

    None, and nothing is written, where the folder has begun a run, or where no finished run of the same identity was
    quoted. Its weights are not there.
    """
    directory, study = plan.directory, quoted(plan.study)
    source = study / directory.relative_to(plan.study)
    if (directory.is_dir() and has_begun(directory)) or not (study / RECORDS).is_file():
        return None
    try:
        if read_result(source) is None or differing_options(plan.config.model_dump(), read_config(source)):
            return None
    except (ValueError, OSError) as error:
        log.warning("%s; it is not taken as finished", error)
        return None
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: content for name in RUN_FILES if (content := read_run_file(source, name)) is not None}
    for name in sorted(files, key=lambda name: name == "result.json"):  # with it the run is finished
        with writing(directory / name) as file:
            file.write(files[name])
    return study / RECORDS


def quoted(study: Path) -> Path:
    """Return where the packed records of a study are: results/quoted/NAME of results/NAME."""
    return study.parent / "quoted" / study.name


# --- Options and their defaults ---


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, _plain_number(value)


def _plain_number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _has_effect(key: str) -> bool:
    """Tell whether neither an option nor its section is marked NoEffect; one that the schema lacks may have one."""
    section: Any = Config
    for name in key.split("."):
        if not (inspect.isclass(section) and issubclass(section, BaseModel)) or name not in section.model_fields:
            return True
        if NoEffect in section.model_fields[name].metadata:
            return False
        section = section.model_fields[name].annotation
    return True


def _defaults(plain: Mapping[str, Any], signatures: bool) -> Options:
    """Return the defaults of the options that can change a result and have one."""
    nodes: Options = {}
    if signatures:
        for group in ("model", "norm"):
            nodes |= _node_defaults(plain.get(group), group)
    return {key: value for key, value in _schema_defaults(Config) if _has_effect(key)} | nodes


def _schema_defaults(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from _schema_defaults(field.annotation, f"{key}.")
        elif not field.is_required():
            yield key, _plain_number(field.get_default(call_default_factory=True))


def _node_defaults(node: Any, path: str) -> Options:
    """Return the defaults in the signature of what a `_target_` names, and of the nodes among its arguments.

    An argument whose default is a data class has the options of that, which a node in its place may leave out.
    """
    target = _find(node.get("_target_")) if isinstance(node, Mapping) else None
    try:
        parameters = inspect.signature(target).parameters if target is not None else {}
    except (ValueError, TypeError):
        parameters = {}
    defaults: Options = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if is_dataclass(default) and not isinstance(default, type):
            kind = type(default)
            defaults[f"{path}.{name}._target_"] = f"{kind.__module__}.{kind.__qualname__}"
            defaults |= {f"{path}.{name}.{f.name}": _plain_number(getattr(default, f.name)) for f in fields(default)}
        elif default is None or isinstance(default, bool | int | float | str | list | tuple):
            defaults[f"{path}.{name}"] = _plain_number(default)
    for name, part in node.items() if isinstance(node, Mapping) else ():
        if isinstance(part, Mapping):
            defaults.pop(f"{path}.{name}", None)
            defaults = _node_defaults(part, f"{path}.{name}") | defaults
        elif f"{path}.{name}._target_" in defaults:
            defaults = {key: value for key, value in defaults.items() if not key.startswith(f"{path}.{name}.")}
    return defaults


def _find(name: Any) -> Any:
    """Return what a `_target_` names if that takes no import of foreign code: a record may come from anywhere."""
    module, _, attribute = str(name).rpartition(".")
    if module.split(".")[0] in OWN_PACKAGES:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return getattr(sys.modules.get(module), attribute, None)

"""A run's identity: the hash, names and folder that follow from the options that decide its result (`options`).

A hash is computed from the configuration, never taken from a record. The folder's name shows in what a run differs
from its groups' files. A cell that an earlier version recorded under another name keeps that name.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from abn_exp.config import NAME, Config, read
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.files import run_lock, writing
from abn_exp.options import Options, all_options, differing_options, set_options
from abn_exp.records import (
    LOOKS,
    NETWORK,
    RECORDS,
    RUN_FILES,
    archived_runs,
    read_run_file,
    read_study_file,
    unite_looks,
)
from abn_exp.results import has_begun, read_result
from abn_exp.trained_network import read_config

log = logging.getLogger(__name__)

GROUPS = ("dataset", "model", "norm", "recipe")


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration and the names that follow from it."""

    config: Config
    choices: dict[str, str]  # dataset, model, norm, recipe: the chosen option of each group
    variant: str  # the recipe and whatever else was overridden

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What is run, without the seed: (dataset, model, norm, variant)."""
        return self.choices["dataset"], self.choices["model"], self.choices["norm"], self.variant

    @property
    def study(self) -> Path:
        """The folder of all runs with this name."""
        return Path(self.config.results_dir, self.config.name)

    @property
    def directory(self) -> Path:
        return Path(self.study, *self.cell, f"seed-{self.config.seed}")

    def differing(self, directory: Path) -> list[str]:
        """Return the options in which the configuration recorded in a folder differs. Raises ValueError where it is
        damaged."""
        return differing_options(self.config.model_dump(), read_config(directory))

    @property
    def config_hash(self) -> str:
        """Twelve hexadecimal digits of the identity."""
        identity = {**self.choices, **set_options(self.config.model_dump()), "seed": self.config.seed}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def plan_run(cfg: DictConfig, choices: dict[str, str]) -> RunPlan:
    """Check a composed configuration and name its cell. Raises ConfigError with one sentence for each mistake."""
    return plan_of(read(cfg), choices, init_by_run(cfg))


def init_by_run(cfg: DictConfig) -> bool:
    """Return whether each run of a sweep has initial weights of its own, as of `init_from=.../seed-${seed}`."""
    return OmegaConf.is_interpolation(cfg, "init_from")


def plan_of(config: Config, choices: dict[str, str], init_by_run: bool) -> RunPlan:
    """Name the cell of a checked configuration: the recipe, and what differs from its groups' files."""
    config = _with_initial_weights(_with_images(config), init_by_run)
    choices = {group: choices[group] for group in GROUPS}
    for group, choice in choices.items():
        if not re.fullmatch(NAME, choice):  # it becomes a folder's name
            raise ConfigError(f"{group}={choice} is not allowed: it should be the name of a file in conf/{group}.")
        # norm=ABN finds abn.yaml where a file system ignores case, and would be another run. The list takes 0.2 s.
        if choice != choice.lower() and choice not in GlobalHydra.instance().config_loader().get_group_options(group):
            raise ConfigError(f"{group}={choice} is not allowed: no file in conf/{group} has exactly this name.")
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    own = _group_options(tuple(place.path for place in places), tuple(choices.items()))
    ours, everything = set_options(config.model_dump()), all_options(config.model_dump())
    changes = {key: everything.get(key) for key in ours.keys() | own.keys() if ours.get(key) != own.get(key)}
    if config.init_cell is not None:
        changes["init_digest"] = config.init_cell
    variant = variant_name(choices["recipe"], changes)
    return RunPlan(config, choices, _recorded_variant(RunPlan(config, choices, variant)) or variant)


@lru_cache(maxsize=1024)  # composing takes a quarter of a second, and a sweep has hundreds of runs
def _group_options(places: tuple[str, ...], choices: tuple[tuple[str, str], ...]) -> Options:
    """Return the options that the files of the chosen groups set. `places`, where Hydra looks, is the cache's key."""
    composed = compose("config", [f"{group}={choice}" for group, choice in choices])
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return set_options({str(key): value for key, value in plain.items()})


def _with_images(config: Config) -> Config:
    """Set `dataset.images` where the set has not as many images as the catalog says: it is another data set then."""
    from abn_exp.data.catalog import CATALOG
    from abn_exp.data.prepare import count_images

    options = config.dataset
    if options.images is not None or options.name not in CATALOG:
        return config
    held = count_images(options.name, options.root, options.image_size, options.num_classes)
    if held in (None, (CATALOG[options.name].train_count, CATALOG[options.name].test_count)):
        return config
    return config.model_copy(update={"dataset": options.model_copy(update={"images": list(held or ())})})


def _with_initial_weights(config: Config, by_run: bool) -> Config:
    """Set `init_digest`, which counts instead of the place where the initial weights lie.

    Where each run has its own, the runs are seeds of one cell all the same. Its name has `init_cell` instead, a
    digest of what is common to the runs that the weights are from: their options without the norm's.
    """
    digest = cell = None
    if config.init_from is not None:
        from abn_exp.warm_start import initial_weights_digest  # torch, which takes seconds to import

        digest = initial_weights_digest(config)
        if by_run:
            try:
                options = set_options(read_config(Path(config.init_from)))
            except DamagedFile as error:
                raise ConfigError(f"init_from: {error}; choose another run.") from error
            common = {k: v for k, v in options.items() if not k.startswith("norm.") and k != "init_digest"}
            cell = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:12]
    return config.model_copy(update={"init_digest": digest, "init_cell": cell})


def variant_name(recipe: str, changes: Mapping[str, Any]) -> str:
    """Return the folder name of a recipe with overrides: ``fixed_epochs-3_model.width-1``.

    ``changes`` maps dotted keys to the values in which a configuration differs from its groups' files. A name
    in which characters were replaced or cut off ends in a digest of all changes, so that no two are equal.
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


def _recorded_variant(plan: RunPlan) -> str | None:
    """Return the folder's name under which the plan's cell was recorded before, or None where it was not."""
    ours = set_options(plan.config.model_dump())
    recipe = plan.choices["recipe"]
    for study in (plan.study, quoted(plan.study)):
        parent = Path(study, *plan.cell[:3])
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

    None, and nothing is written, with `force`, where a run has begun in the folder, or where no finished run of the
    same identity was quoted. It has weights where the study was packed with its networks.
    """
    directory, study = plan.directory, quoted(plan.study)
    source = study / directory.relative_to(plan.study)
    begun = directory.is_dir() and has_begun(directory)
    if plan.config.force or begun or not (study / RECORDS).is_file():
        return None
    try:
        if read_result(source) is None or plan.differing(source):
            return None
    except (ValueError, OSError) as error:
        log.warning("%s; it is not taken as finished", error)
        return None
    files = {name: content for name in RUN_FILES if (content := read_run_file(source, name)) is not None}
    try:
        files |= {NETWORK: content} if (content := read_run_file(source, NETWORK)) is not None else {}
    except (ValueError, OSError) as error:
        log.warning("%s; the run is restored without its network", error)
    directory.mkdir(parents=True, exist_ok=True)
    with run_lock(directory) as free:
        if not free or has_begun(directory):  # another process has been faster
            return None
        for name in sorted(files, key=lambda name: name == "result.json"):  # with it the run is finished
            with writing(directory / name) as file:
                file.write(files[name])
    for name in ("plan.json", LOOKS):  # else what was planned, or looked at, would be unknown beside the run
        packed, own = (read_study_file(place, name) for place in (study, plan.study))
        if name == LOOKS and packed is not None:
            packed = unite_looks(study / name, packed, own)
        if packed not in (None, own) and (own is None or name == LOOKS):
            with writing(plan.study / name) as file:
                file.write(packed)
    return study / RECORDS


def quoted(study: Path) -> Path:
    """Return where the packed records of a study are: results/quoted/NAME of results/NAME."""
    return study.parent / "quoted" / study.name

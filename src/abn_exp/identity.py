"""A run's plan: its checked configuration, and the names and folder that follow from it."""

import re
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from abn_exp.config import NAME, Config, read, result_affecting_options
from abn_exp.errors import ConfigError
from abn_exp.results import variant_name

GROUPS = ("dataset", "model", "norm", "recipe")


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
    def directory(self) -> Path:
        parts = [self.choices[group] for group in ("dataset", "model", "norm")]
        return Path(self.config.results_dir, self.config.name, *parts, self.variant, f"seed-{self.config.seed}")


def plan_run(cfg: DictConfig, choices: dict[str, str]) -> RunPlan:
    """Check a composed configuration and name its cell: the recipe, and whatever differs from the groups' own.

    Raises ConfigError with one sentence for each mistake.
    """
    config = read(cfg)
    digest = None
    if config.init_from is not None:
        from abn_exp.warm_start import initial_weights_digest  # torch, which takes seconds to import

        digest = initial_weights_digest(config)
    config = config.model_copy(update={"init_digest": digest})
    choices = {group: choices[group] for group in GROUPS}
    for group, choice in choices.items():
        if not re.fullmatch(NAME, choice):  # it becomes a folder's name
            raise ConfigError(f"{group}={choice} is not allowed: it should be the name of a file in conf/{group}.")
    own = compose("config", [f"{group}={choice}" for group, choice in choices.items()])
    plain = OmegaConf.to_container(own, resolve=True)
    assert isinstance(plain, dict)
    default = result_affecting_options({str(key): value for key, value in plain.items()})
    ours = result_affecting_options(config.model_dump())
    changes = {key: value for key, value in ours.items() if key not in default or default[key] != value}
    # What the recipe's file sets and an override puts back to the schema's default.
    everything = result_affecting_options(config.model_dump(), defaults=True)
    changes |= {key: everything[key] for key in default.keys() - ours.keys() if key in everything}
    return RunPlan(config, choices, variant_name(choices["recipe"], changes))

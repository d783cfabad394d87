"""Continue a finished shorter run of the same first epochs, where `recipe.epochs` is raised."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from abn_exp.config import Config
from abn_exp.errors import DamagedFile
from abn_exp.files import writing
from abn_exp.identity import RunPlan
from abn_exp.options import set_options
from abn_exp.provenance import device_kind
from abn_exp.results import read_result
from abn_exp.trained_network import read_checkpoint, read_config

log = logging.getLogger(__name__)


def begin_with_shorter_run(plan: RunPlan, device: torch.device) -> bool:
    """Copy the checkpoints of the longest finished run with the same first epochs into a run's folder, and log it;
    return whether there was one.

    The shorter run's record is not changed. Where there is such a run that cannot be continued, the log says why, and
    training begins at the start.
    """
    shorter = _shorter_runs(plan)
    if not shorter:
        return False
    epochs, directory = max(shorter)
    start = "training begins at the start"
    if (why := _depends_on_length(plan.config)) is not None:
        log.info("%s has %d of these epochs, but %s: %s", directory, epochs, why, start)
        return False
    for epochs, directory in sorted(shorter, reverse=True):
        source = directory / "checkpoints"
        try:
            checkpoint = read_checkpoint(source / "last.ckpt")
            if (kind := checkpoint.get("device")) not in (None, device_kind(device)):
                log.info("%s has %d of these epochs, but was trained on %s", directory, epochs, kind)
                continue
            if not checkpoint["optimizer_states"]:
                log.info("%s has %d of these epochs, but only its weights (keep=all keeps more)", directory, epochs)
                continue
            for name in ("best.ckpt", "last.ckpt"):  # last.ckpt last: with it the run has begun
                if (source / name).is_file():
                    _copy(source / name, plan.directory / "checkpoints" / name)
        except (DamagedFile, KeyError, OSError) as error:
            log.info("%s has %d of these epochs, but cannot be gone on from: %s", directory, epochs, error)
            continue
        log.info("the first %d epochs are those of %s", epochs, directory)
        return True
    log.info(start)
    return False


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as content, writing(target) as file:
        shutil.copyfileobj(content, file)


def _shorter_runs(plan: RunPlan) -> list[tuple[int, Path]]:
    """Return (epochs, directory) of the finished runs that differ from this one in having fewer epochs alone."""
    found = []
    ours = _without_epochs(plan.config.model_dump())
    for path in plan.directory.parents[1].glob(f"*/{plan.directory.name}/result.json"):
        try:
            theirs = read_config(path.parent)
            epochs = theirs["recipe"]["epochs"]
            same = epochs < plan.config.recipe.epochs and _without_epochs(theirs) == ours
            if same and read_result(path.parent) is not None:
                found.append((epochs, path.parent))
        except (ValueError, KeyError, TypeError, OSError):
            continue  # unreadable, or of another version: it cannot be continued
    return found


def _without_epochs(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in set_options(plain).items() if key != "recipe.epochs"}


def _depends_on_length(config: Config) -> str | None:
    """Return why the first epochs of a run are not those of a longer one, or None where they are."""
    recipe = config.recipe
    if recipe.schedule.name != "constant":
        return f"with recipe.schedule.name={recipe.schedule.name} the rate of each depends on how many there are"
    if recipe.clip_latent_weights and recipe.clip_latent_range != [0.0, 1.0]:
        return "recipe.clip_latent_range is a share of them all"
    return None

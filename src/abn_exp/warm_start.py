"""Start from another run's weights (`init_from=RUN`): the digest that identifies them, and what fits a network."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from abn_exp.config import Config
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.models.build import build_network
from abn_exp.trained_network import read_checkpoint

log = logging.getLogger(__name__)


def initial_weights_digest(config: Config) -> str:
    """Return the digest of the weights in `config.init_from`, after a check that they fit the network.

    Raises ConfigError, in one sentence, where there are none or where they do not fit.
    """
    weights = _read_weights(config)
    if config.dataset.num_classes is not None:  # else checked when the data are loaded
        with torch.device("meta"):
            network = build_network(config.model, config.norm, config.dataset.num_classes, config.dataset.image_size)
        _common_names(network, weights, config)
    return weights_digest(weights)


def load_initial_weights_(network: nn.Module, config: Config) -> nn.Module:
    """Load the weights in `config.init_from` into `network`, in place, and log what did not fit; return the network.

    Parameters and buffers (running statistics) are matched by name; names of one side alone are skipped.
    Raises ConfigError where a shape differs, no name is common, or the weights are not those of the plan.
    """
    weights = _read_weights(config)
    if weights_digest(weights) != config.init_digest:
        raise ConfigError(
            f"init_from={config.init_from}: its weights have changed meanwhile; give the command again."
        )
    names = _common_names(network, weights, config)
    network.load_state_dict({name: weights[name] for name in names}, strict=False)
    log.info("initial weights: %d tensors from %s", len(names), config.init_from)
    if unused := sorted(weights.keys() - names):
        log.info("not in this network, left out: %s", ", ".join(unused))
    if untouched := sorted(network.state_dict().keys() - names):
        log.info("not in those weights, started as usual: %s", ", ".join(untouched))
    return network


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return twelve hexadecimal digits that depend on names, types, shapes and values, and not on their order."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_weights(config: Config) -> dict[str, Tensor]:
    path = Path(str(config.init_from)) / "checkpoints" / "last.ckpt"
    try:
        state = read_checkpoint(path)["state_dict"]
    except FileNotFoundError as error:
        raise ConfigError(
            f"init_from={config.init_from} has no checkpoints/last.ckpt; give the folder of a run (.../seed-0)."
        ) from error
    except (DamagedFile, OSError) as error:
        raise ConfigError(f"init_from: {error}; choose another run, or train it again with force=true.") from error
    return {name.removeprefix("network."): value for name, value in state.items()}


def _common_names(network: nn.Module, weights: Mapping[str, Tensor], config: Config) -> set[str]:
    """Return the names that a network and the weights have in common. Raises ConfigError where a shape differs."""
    own = network.state_dict()
    names = own.keys() & weights.keys()
    wrong = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in names and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"init_from={config.init_from} does not fit: {', '.join(wrong[:3])}{more}; model.width, "
            "dataset.image_size and the number of classes should be the same."
        )
    if not names:
        raise ConfigError(
            f"init_from={config.init_from} does not fit: no name is common; use a run of the same model."
        )
    return names

"""Binary activations of trained networks: the distribution of their inputs, and each norm's response curve.

For every binary layer, over the test set: P(+1) of its binarized input by channel, entropy, imbalance |2 P - 1|,
constant channels. For every norm on feature maps: its response to a standardised input, and how many thresholds a
sign behind it has.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import entr, lambertw
from torch import Tensor, nn

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.report.stats import Array

RANGE, BINS = 4.0, 160  # values beyond are counted in the outermost bins
EDGES = np.linspace(-RANGE, RANGE, BINS + 1)
# Standardised inputs of the response curves; symmetric, so of mean 0. A second threshold lies the farther out the
# smaller the shift is that makes it: at -4.8 for 0.04, at -16 for 2e-6.
GRID = np.linspace(-16.0, 16.0, 1281)
DRAWN = 4.0  # of it, to either side, at least
WIDE = np.linspace(-8.0, 8.0, 2561)  # where all of a normal distribution is, for shares of it
BATCH = 100  # images; the bookkeeping of a layer takes a few times its activations' memory
SILU_MINIMUM = -float(lambertw(math.exp(-1)).real)  # at -1 - W(1/e) = -1.27846: -W(1/e) = -0.27846
CHANNELS = 7  # whose responses are kept
BANDS = ("one threshold", "two thresholds", "always +1", "always -1")

Kind = Literal["binary input", "norm output"]


def entropy(p: ArrayLike) -> Array:
    """Return H(p) = -p log2 p - (1 - p) log2(1 - p) in bits, 0 at p = 0 and 1; any shape."""
    p = np.asarray(p, dtype=np.float64)
    return (entr(p) + entr(1 - p)) / math.log(2)


def imbalance(p: ArrayLike) -> Array:
    """Return |2 p - 1|: 0 for a fair coin, 1 for a constant; any shape."""
    return np.abs(2 * np.asarray(p, dtype=np.float64) - 1)


@dataclass
class Distribution:
    """Values at one place of a network, added up batch by batch. `plus` counts +1 in each channel."""

    name: str
    kind: Kind
    feature_map: bool  # whether they come from a norm on feature maps (else: from one in the head)
    channels: int
    plus: Tensor  # (channels,)
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    count: int = 0  # values a channel

    def add(self, x: Tensor, plus: Tensor) -> None:
        """Add real values x (B, C, ...), or (B, C * n) flattened, and whether each becomes +1, of x's shape."""
        by_channel = plus if plus.ndim == 4 else plus.reshape(len(x), self.channels, -1, 1)
        self.plus += by_channel.sum((0, 2, 3)).cpu()
        self.count += by_channel[:, 0].numel()
        bins = (x + RANGE).mul_(BINS / (2 * RANGE)).clamp_(0, BINS - 1).to(torch.uint8)  # which takes the floor
        flat = bins.permute(0, 2, 3, 1) if bins.is_contiguous(memory_format=torch.channels_last) else bins
        self.histogram += torch.bincount(flat.reshape(-1), minlength=BINS).cpu()

    @property
    def p_plus(self) -> Array:
        """P(+1) of each channel, (C,)."""
        return self.plus.double().numpy() / self.count

    def scores(self) -> dict[str, float]:
        """Return the numbers a layer is described by; a channel is constant if all its values have one sign."""
        p = self.p_plus
        return {
            "p_plus": float(p.mean()),
            "imbalance_of_channels": float(imbalance(p).mean()),
            "imbalance_of_layer": float(imbalance(p.mean())),
            "entropy_of_channels": float(entropy(p).mean()),
            "entropy_of_layer": float(entropy(p.mean())),
            "constant_channels": float(np.mean((p == 0) | (p == 1))),
        }


def places(network: nn.Module, image: Tensor) -> dict[str, Distribution]:
    """Return an empty distribution for the input of each binary layer and the output of each norm on feature maps.

    In order of execution, by module name; a binary layer whose input another one has binarized already (a shortcut)
    is left out, so that no value counts twice. A flattened map keeps its channels.
    """
    found: dict[str, Distribution] = {}
    seen: list[Tensor] = []
    last_norm: list[nn.Module] = []

    def note(name: str, kind: Kind, feature_map: bool, channels: int) -> None:
        found[name] = Distribution(name, kind, feature_map, channels, torch.zeros(channels, dtype=torch.int64))

    def before(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(layer, BinaryConv2d | BinaryLinear) and not any(x is other for other in seen):
            seen.append(x)
            norm = last_norm[-1] if last_norm else None
            channels = x.shape[1]
            if isinstance(norm, nn.BatchNorm2d) and channels % norm.num_features == 0 and x.ndim == 2:
                channels = norm.num_features
            note(name, "binary input", isinstance(norm, nn.BatchNorm2d), channels)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            last_norm.append(layer)
        if isinstance(layer, nn.BatchNorm2d):
            note(name, "norm output", True, layer.num_features)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name)))
        network(image)
    return found


def check_places(network: nn.Module, image: Tensor) -> None:
    """Raise ValueError where no binary layer follows a norm on feature maps, so that there is nothing to analyse."""
    if not any(place.kind == "binary input" and place.feature_map for place in places(network, image).values()):
        raise ValueError("This network has no binary layer behind a norm on feature maps, which this analysis is of.")


@torch.no_grad()
def measure(network: nn.Module, images: Tensor) -> tuple[list[Distribution], Tensor]:
    """Return the distributions over `images` (N, 3, S, S) and the predicted classes (N,). Only counts are kept."""
    found = places(network, images[:1])

    def add(place: Distribution, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, BinaryConv2d | BinaryLinear):
            place.add(args[0], args[0] >= 0 if module.binarization.sign_zero == "plus" else args[0] > 0)
        else:
            place.add(output, output >= 0)

    with ExitStack() as hooks:
        for name, place in found.items():
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(add, place)))
        predicted = torch.cat([network(batch).argmax(1) for batch in images.split(BATCH)])
    return list(found.values()), predicted.cpu()


@torch.no_grad()
def response(norm: nn.BatchNorm2d, xhat: ArrayLike = GRID) -> Array:
    """Return a norm's output, (C, G), for standardised inputs xhat (G,), by running the norm itself.

    It is fed running_mean + sqrt(running_var + eps) * xhat, as one image; a gate on an image's mean therefore sees
    the running mean, if xhat's mean is 0.
    """
    norm = deepcopy(norm).double().cpu().eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    grid = torch.as_tensor(np.asarray(xhat, dtype=np.float64))
    x = norm.running_mean[:, None] + (norm.running_var[:, None] + norm.eps).sqrt() * grid
    return norm(x[None, :, :, None])[0, :, :, 0].numpy()


def drawn_part(plus: ArrayLike) -> slice:
    """Return the part of GRID that holds all thresholds, with a margin, and -4 to 4 at least.

    ``plus`` (..., G) is whether a sign is +1, or the share of channels whose sign is.
    """
    plus = np.asarray(plus, dtype=np.float64).reshape(-1, len(GRID))
    at = np.flatnonzero((np.diff(plus, axis=1) != 0).any(0))
    low, high = (GRID[at[0]] - 0.5, GRID[at[-1]] + 0.5) if len(at) else (0.0, 0.0)
    first, last = np.searchsorted(GRID, [min(low, -DRAWN) - 1e-9, max(high, DRAWN) + 1e-9])
    return slice(int(first), int(last))


def beyond_one_threshold(y: Array) -> Array:
    """Return for each response y (C, G) to WIDE the share of inputs whose sign no single threshold gives, (C,).

    Inputs are standard normal; the threshold, and which side is +1, are the best ones.
    0 for whatever is monotone. For SiLU(xhat) + beta with two thresholds close to 0 it is the normal distribution
    below the lower one: how much of the second threshold is used.
    """
    weights = np.exp(-(WIDE**2) / 2)
    weights /= weights.sum()
    plus = (y >= 0) * weights
    edge = np.zeros((len(y), 1))
    plus_left = np.hstack([edge, plus.cumsum(1)])
    minus_left = np.hstack([edge, (weights - plus).cumsum(1)])
    up = plus_left + minus_left[:, -1:] - minus_left  # +1 to the right of the threshold
    down = minus_left + plus_left[:, -1:] - plus_left
    return np.clip(np.minimum(up.min(1), down.min(1)), 0, None)


def band_shares(norm: nn.Module) -> dict[str, float] | None:
    """Return the share of channels in each of `BANDS`, from the norm's parameters; None where no formula is known.

    A sign behind gamma SiLU(xhat) + beta has one threshold on xhat where beta / gamma <= 0, two where it is between
    0 and 0.27846, none above; a negative gamma turns +1 into -1. A scale inside the gate moves thresholds, and
    changes their number only where it is 0. Without a gate in the forward pass there is one threshold.
    """
    attention = type(norm) is AttentionBatchNorm2d  # another formula's, of a class of one's own, is not known
    if not isinstance(norm, nn.BatchNorm2d) or not (attention or type(norm) is nn.BatchNorm2d):
        return None
    beta, gamma = (
        torch.full((norm.num_features,), default) if value is None else value.detach().cpu()
        for value, default in ((norm.bias, 0.0), (norm.weight, 1.0))
    )
    gated = attention and norm.gate in ("full", "forward")
    inside = attention and norm.scale == "gate"
    shift = (beta if inside else beta / gamma).double()
    stuck = gated & (shift >= -SILU_MINIMUM)
    negative = torch.zeros_like(stuck) if inside else gamma < 0
    up = torch.where(gamma == 0, beta >= 0, stuck & ~negative)
    down = torch.where(gamma == 0, beta < 0, stuck & negative)
    two = gated & (gamma != 0) & (shift > 0) & ~stuck
    masks = (~(two | up | down), two, up, down)
    return {band: float(mask.double().mean()) for band, mask in zip(BANDS, masks, strict=True)}


@dataclass(frozen=True)
class LearnedNorm:
    """The function of a norm on feature maps, from its learned parameters alone."""

    responses: Tensor  # (7, G): of channels spread evenly from the lowest mean response to the highest
    signs: Tensor  # (G,): the share of channels whose sign is +1
    beyond: float  # beyond_one_threshold, mean over channels
    bands: dict[str, float] | None
    beta: float  # mean over channels, 0 where there is none, NaN where a norm may name its shift otherwise


def learned_norm(norm: nn.BatchNorm2d) -> LearnedNorm:
    """Describe one norm."""
    y = response(norm)
    order = np.argsort(y.mean(1), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, CHANNELS).astype(int)]
    bands = band_shares(norm)
    beta = float(norm.bias.detach().mean()) if norm.bias is not None else math.nan if bands is None else 0.0
    beyond = float(beyond_one_threshold(response(norm, WIDE)).mean())
    signs = torch.from_numpy((y >= 0).mean(0))
    return LearnedNorm(torch.from_numpy(y[chosen]), signs, beyond, bands, beta)


@dataclass(frozen=True)
class NetworkActivations:
    """What was measured of one network; `norms` by the norm's name."""

    places: list[Distribution]
    images: int
    accuracy: float
    norms: dict[str, LearnedNorm]

    def layers(self, kind: Kind = "binary input") -> list[Distribution]:
        """Return the places of a kind that a norm on feature maps feeds."""
        return [place for place in self.places if place.kind == kind and place.feature_map]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """Return the object of which `plain` is the `asdict`."""
        places = [Distribution(**values) for values in plain["places"]]
        norms = {name: LearnedNorm(**values) for name, values in plain["norms"].items()}
        return cls(**plain | {"places": places, "norms": norms})

    def scores(self) -> dict[str, float]:
        """Return the means over the binary layers that a norm on feature maps feeds."""
        each = [layer.scores() for layer in self.layers()]
        return {key: float(np.mean([scores[key] for scores in each])) for key in each[0]}


def analyze(network: nn.Module, images: Tensor, labels: Iterable[int] | Tensor) -> NetworkActivations:
    """Measure one network on normalised images (N, 3, S, S) with labels (N,)."""
    found, predicted = measure(network, images)
    norms = {name: learned_norm(norm) for name, norm in network.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    accuracy = float((predicted == torch.as_tensor(labels)).double().mean())
    return NetworkActivations(found, len(images), accuracy, norms)

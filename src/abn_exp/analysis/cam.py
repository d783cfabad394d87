"""Class-activation maps of trained networks, and scores by which one can be better than another.

Maps are Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391); the gradient through a sign is the network's
own straight-through estimate. Sizes: images (B, 3, S, S), maps (B, S, S), boxes (B, 4): x0, y0, x1, y1, both corners
inside.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from abn_exp.seeding import generator

SMALLEST = 4  # a map of fewer pixels a side is too coarse to locate anything
STEPS = 16  # of the deletion and insertion curves
BATCH = 100  # images


class Maps(NamedTuple):
    maps: Tensor  # (B, S, S), not negative
    probabilities: Tensor  # (B, num_classes)
    targets: Tensor  # (B,): the class that a map is of
    cells: tuple[int, int]  # the size of the maps before they were enlarged


def target_layer(network: nn.Module, image: Tensor) -> str:
    """Return the name of the module that, in order of execution, is the last to give a map of at least 4 x 4.

    A stage, not its last layer, where both give the same map: only the stage sees a residual block's sum.
    Raises ValueError where there is none.
    """
    names: list[str] = []

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= SMALLEST:
            names.append(name)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        network(image[:1])
    if not names:
        raise ValueError(f"The network has no feature map of at least {SMALLEST} x {SMALLEST} to make a map from.")
    return names[-1]


def grad_cam(network: nn.Module, layer: str, images: Tensor, targets: Tensor | None = None) -> Maps:
    r"""Return the Grad-CAM of each image for its target class, by default the predicted one.

    .. math:: M = \mathrm{ReLU}\Big(\sum_c \alpha_c A_c\Big), \qquad
              \alpha_c = \mathrm{mean}_{h, w} \frac{\partial\, \mathrm{logit}}{\partial A_c}

    A is the output of the module named `layer`, its last where it is used several times; M is enlarged bilinearly to
    the image.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # whatever follows may work in place

    with network.get_submodule(layer).register_forward_hook(keep), torch.enable_grad():
        logits = network(images)
        targets = logits.argmax(1) if targets is None else targets.to(logits.device)
        (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept[-1:])
    weights = gradient.mean((2, 3), keepdim=True)
    small = F.relu((weights * kept[-1].detach()).sum(1, keepdim=True))
    maps = F.interpolate(small, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return Maps(maps, logits.detach().softmax(1), targets, (small.shape[2], small.shape[3]))


def inside(boxes: Tensor, size: int) -> Tensor:
    """Return which pixels are in each box: bool (B, size, size)."""
    x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes.unbind(1))
    at = torch.arange(size, device=boxes.device)
    row, column = at[:, None], at[None, :]
    return (x0 <= column) & (column <= x1) & (y0 <= row) & (row <= y1)


def box_area(boxes: Tensor, size: int) -> Tensor:
    """Return each box's share of the image, (B,): the score of an uninformative map."""
    return inside(boxes, size).float().mean((1, 2))


def energy_inside(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return the share of each map's sum that lies in the box, (B,); a map of zeros scores the box's area."""
    mask, total = inside(boxes, maps.shape[1]), maps.sum((1, 2))
    return torch.where(total > 0, (maps * mask).sum((1, 2)) / total, mask.to(maps.dtype).mean((1, 2)))


def pointing_game(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return 1 where the map's maximum lies in the box, else 0, (B,); a map of zeros scores the box's area.

    Of several maxima the share inside counts. (Zhang et al., ECCV 2016, arXiv 1608.00507.)
    """
    mask = inside(boxes, maps.shape[1])
    peaks = maps == maps.amax((1, 2), keepdim=True)
    return (peaks & mask).sum((1, 2)) / peaks.sum((1, 2))


def random_maps(indices: Tensor, cells: tuple[int, int], size: int) -> Tensor:
    """Return an uninformative map for each image, (B, size, size), from the image's index alone.

    As smooth as a Grad-CAM of `cells`: uniform noise of that many, enlarged in the same way. (Single pixels in random
    order would be noise that no network has seen, and any map would look good or bad beside them.)
    """
    noise = torch.stack([torch.rand(1, *cells, generator=generator(int(i), "random map")) for i in indices])
    return F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)[:, 0]


def by_importance(maps: Tensor, ties: Tensor) -> Tensor:
    """Return the pixels of each map, the largest value first, (B, S * S); equal ones as in `ties`, maps too."""
    first = ties.flatten(1).argsort(dim=1, descending=True, stable=True)
    values = maps.flatten(1).gather(1, first)
    return first.gather(1, values.argsort(dim=1, descending=True, stable=True))


@torch.no_grad()
def probability(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return the probability of each image's target class, (B,)."""
    return network(images).softmax(1).gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def replacement_curve(
    network: nn.Module,
    before: Tensor,
    after: Tensor,
    order: Tensor,
    targets: Tensor,
    ends: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the targets' probabilities, (B, STEPS + 1), while pixels of `before` are replaced by those of `after`.

    At step k the first k / STEPS of the pixels in `order` (B, S * S) are. `ends` are the probabilities of `before`
    and of `after`, (B,): several curves have them in common. Deletion goes from the image to a constant one,
    insertion from a blurred image to the image (Petsiuk et al., BMVC 2018, arXiv 1806.07421).
    """
    size = before.shape[-1]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size * size, device=order.device).expand_as(order))
    rank = rank.view(-1, 1, size, size)
    between = [
        probability(network, torch.where(rank < k * size * size / STEPS, after, before), targets)
        for k in range(1, STEPS)
    ]
    return torch.stack([ends[0], *between, ends[1]], 1)


def area_under(curves: Tensor) -> Tensor:
    """Return the area under each curve (B, points) over [0, 1], by trapezoids."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def blur(images: Tensor) -> Tensor:
    """Return the images, blurred by a Gaussian of an eighth of their size, which leaves little but colour."""
    size = images.shape[-1]
    return gaussian_blur(images, [size // 2 + 1 - size // 2 % 2] * 2, [size / 8] * 2)


def analyze(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    boxes: Tensor | None = None,
    target: str = "predicted",
) -> dict[str, np.ndarray]:
    """Return the scores of each image, all (N,) but the curves (N, 17).

    images: normalised, so that 0 is the mean pixel. `target` is the class that maps and curves are of: "predicted"
    or "label". A gain is how much better the map's order is than a random map's: less area under the curve
    of deletion, more under that of insertion.
    """
    layer = target_layer(network, images)
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(images)).split(BATCH):
        x, truth = images[rows], labels[rows].to(images.device)
        cam = grad_cam(network, layer, x, truth if target == "label" else None)
        noise = random_maps(indices[rows], cam.cells, x.shape[-1]).to(x.device)
        order, chance = by_importance(cam.maps, noise), by_importance(noise, noise)
        constant, blurred = torch.zeros_like(x), blur(x)
        at_image = cam.probabilities.gather(1, cam.targets[:, None])[:, 0]
        at_blurred = probability(network, blurred, cam.targets)
        at_constant = network(constant[:1]).softmax(1)[0, cam.targets]
        kinds = ((x, constant, (at_image, at_constant)), (blurred, x, (at_blurred, at_image)))
        deletion, insertion, random_deletion, random_insertion = (
            replacement_curve(network, before, after, which, cam.targets, ends)
            for which in (order, chance)
            for before, after, ends in kinds
        )
        scores = {
            "predicted": cam.probabilities.argmax(1),
            "probability": at_image,
            "correct": cam.probabilities.argmax(1) == truth,
            "empty_map": cam.maps.sum((1, 2)) == 0,
            "deletion_gain": area_under(random_deletion) - area_under(deletion),
            "insertion_gain": area_under(insertion) - area_under(random_insertion),
            "deletion_area": area_under(deletion),
            "insertion_area": area_under(insertion),
            "deletion": deletion,
            "insertion": insertion,
            "random_deletion": random_deletion,
            "random_insertion": random_insertion,
        }
        if boxes is not None:
            corners = boxes[rows].to(x.device)
            scores |= {
                "energy_inside": energy_inside(cam.maps, corners),
                "pointing_game": pointing_game(cam.maps, corners),
                "box_area": box_area(corners, x.shape[-1]),
            }
        for key, values in scores.items():
            found.setdefault(key, []).append(values.cpu())
    return {key: torch.cat(values).numpy() for key, values in found.items()}

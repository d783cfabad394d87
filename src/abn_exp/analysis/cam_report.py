"""The report on class-activation maps of trained networks, norm beside norm on the same images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from abn_exp.analysis import cam, pictures
from abn_exp.analysis.summary import (
    AnalysisWriter,
    Contrast,
    check_pairs,
    contrast,
    contrast_rows,
    contrast_table,
    counts_text,
    group_names,
    group_title,
    means_table,
)
from abn_exp.analysis.trained import Measured, Opener, TestImages, measure_each
from abn_exp.report.comparisons import Cell, collect_cells, group_cells
from abn_exp.report.stats import NAN
from abn_exp.results import Run

JUDGED = {
    "energy_inside": "share inside the box",
    "pointing_game": "pointing game",
    "deletion_gain": "deletion gain",
    "insertion_gain": "insertion gain",
}
DESCRIBED = {
    "box_area": "area of the box",
    "deletion_area": "deletion area",
    "insertion_area": "insertion area",
    "probability": "probability",
    "correct": "correct",
    "empty_map": "empty maps",
}
SUBSETS = ("all", "correct", "wrong")
ROWS = {"right by both": 3, "right by one": 2}  # how many images of a kind the picture shows
NOTES = """\
- A map is Grad-CAM at the last feature map of at least 4 x 4 pixels, enlarged bilinearly; gradients through signs
  are the network's own straight-through estimates. Every network sees the same images.
- Deletion replaces pixels by the colour that the run's normalisation makes 0, which is the training images' mean
  (ImageNet's under recipe=paper), the map's largest values first; insertion puts them into a blurred image. The score
  is the area under the class's probability. A network that is surer of itself has larger areas, so what is judged is
  the gain: how much better than a random map of the same smoothness, the same for all networks. 0 is a map that knows
  nothing; below 0, it points elsewhere.
- The share of the map inside the box, and the pointing game, are to be held against the box's area, which is what a
  map that knows nothing scores. A map that is zero everywhere scores just that.
- Correct and wrong predictions are apart because a map of a wrong class may rightly be elsewhere; which images are
  correct is each network's own affair.
- Means are over images, then over seeds, with Student's 95 % interval over seeds; differences are paired by seed. A
  verdict asks for p < 0.05 after Holm's correction over all judged differences. "Undecided" is no evidence that
  norms are equal."""


def subset_scores(found: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the mean of each score over all images, the correctly and the wrongly classified, NaN where none is, and
    where the images have no boxes."""
    correct = found["correct"]
    subsets = dict(zip(SUBSETS, (np.ones_like(correct), correct, ~correct), strict=True))
    return {
        name: {
            text: float(found[key][chosen].astype(np.float64).mean()) if key in found and chosen.any() else NAN
            for key, text in (JUDGED | DESCRIBED).items()
        }
        for name, chosen in subsets.items()
    }


def write(
    runs: Sequence[Run], opener: Opener, out: Path, command: str, *, reference: str = "bn", target: str = "predicted"
) -> AnalysisWriter:
    """Analyse the runs' networks and write summary.md, images.csv, comparison.csv, figures into `out`."""
    cells = collect_cells(runs, reference)
    check_pairs(cells, reference)
    report = AnalysisWriter(out, f"Class-activation maps: {runs[0].directory.parents[4].name}", command, runs)
    opener.check(runs, cam.target_layer)

    def measure(network: nn.Module, images: TestImages) -> Measured:
        scores = cam.analyze(network, images.normalized, images.labels, images.indices, images.boxes, target)
        return {key: torch.from_numpy(values) for key, values in scores.items()}

    measured = measure_each(runs, opener, measure, out / "parts", f"cam 1 {target}")
    found = {directory: {key: v.numpy() for key, v in one.items()} for directory, one in measured.items()}
    subsets = {directory: subset_scores(one) for directory, one in found.items()}
    scores = {name: {directory: one[name] for directory, one in subsets.items()} for name in SUBSETS}
    for group, members in group_cells(cells).items():
        where, name = group_title(cells, group), group_names(cells)[group]
        for key in ("deletion", "insertion"):
            report.figure(f"{key}_{name}", _curves(members, found, key, where), f"{key.capitalize()} curves, {where}")
        report.figure(f"maps_{name}", _maps(members, opener, found, target), f"Maps of a few images, {where}")
    judged, described = (
        [text for key, text in measures.items() if any(key in values for values in found.values())]
        for measures in (JUDGED, DESCRIBED)
    )
    measures = [*judged, *described]
    counts = {run.dataset: len(found[run.directory]["correct"]) for run in runs}

    report.parts.append(
        "Does ABN help to capture image features (claim C4)? If so, its class-activation maps should fit the object, "
        f"or the pixels that decide, better than {reference}'s. Images: {counts_text(counts)} "
        f"of the test set, the same for all; class of a map: the {'true' if target == 'label' else 'predicted'} one."
    )

    def compared(subset: str) -> list[Contrast]:
        return [c for c in contrast(cells, scores[subset], judged, reference) if c.paired.n[0]]

    contrasts = compared("all")
    report.verdicts(f"Do the maps score higher than {reference}'s?", contrasts, cells, reference)
    report.table("scores", "Scores over all images", means_table(cells, scores["all"], measures))
    report.table("differences", f"Differences to {reference}, all images", contrast_table(contrasts))
    parts: list[Contrast] = []
    for subset, text in (("correct", "Correctly classified images"), ("wrong", "Wrongly classified images")):
        report.table(f"scores_{subset}", text, means_table(cells, scores[subset], measures))
        own = compared(subset)
        report.table(f"differences_{subset}", f"{text}, differences to {reference}", contrast_table(own))
        parts += own
    report.csv("comparison", contrast_rows(contrasts, judged=True))
    report.csv("comparison_correct_wrong", contrast_rows(parts, judged=False))
    report.csv("images", _rows(cells, found, opener))
    report.finish(NOTES, opener.measured_on)
    report.show("scores")
    return report


def _curves(members: Sequence[Cell], found: dict[Path, dict[str, np.ndarray]], key: str, where: str) -> Figure:
    panels = {
        text: {cell.norm: np.array([found[run.directory][which].mean(0) for run in cell.runs]) for cell in members}
        for which, text in ((key, "by Grad-CAM"), (f"random_{key}", "by a random map"))
    }
    x = np.linspace(0, 100, cam.STEPS + 1)
    verb = {"deletion": "deleted", "insertion": "inserted"}[key]
    return pictures.curves(
        panels, x, f"{key.capitalize()}, {where}", f"Pixels {verb} (%)", "Probability of the class"
    )


def _maps(
    members: Sequence[Cell], opener: Opener, found: dict[Path, dict[str, np.ndarray]], target: str
) -> Figure | None:
    """Draw a few images with the maps of the reference and up to three other norms, of the first common seed."""
    members = members[:4]
    common = set.intersection(*({run.seed for run in cell.runs} for cell in members))
    if not common:
        return None
    runs = [run for cell in members for run in cell.runs if run.seed == min(common)]
    images = opener.images(runs[0])
    correct = np.array([found[run.directory]["correct"] for run in runs])
    both, one = correct.all(0), correct.any(0) & ~correct.all(0)
    chosen = [i for kind, mask in zip(ROWS, (both, one), strict=True) for i in _spread(np.asarray(mask), ROWS[kind])]
    if not chosen:
        chosen = [0]
    classes = images.data.classes
    maps, titles = {}, {}
    x, labels = images.normalized[chosen], images.labels[chosen]
    for run in runs:
        network, scores = opener.network(run), found[run.directory]
        made = cam.grad_cam(network, cam.target_layer(network, x), x, labels if target == "label" else None)
        maps[run.norm] = made.maps.cpu().numpy()
        titles[run.norm] = [
            f"{run.norm}:\n{classes[c]} {p:.2f}" + ("" if right else " (wrong)")
            for c, p, right in zip(
                made.targets.tolist(), scores["probability"][chosen], scores["correct"][chosen], strict=True
            )
        ]
    pixels = images.data.test.images[images.indices[chosen]].permute(0, 2, 3, 1).numpy() / 255
    rows = [f"image {int(images.indices[i])}:\n{classes[int(images.labels[i])]}" for i in chosen]
    return pictures.overlays(pixels, rows, maps, titles)


def _spread(mask: np.ndarray, count: int) -> list[int]:
    """Return up to `count` indices of a mask, spread evenly over it, so that they are of several classes."""
    at = np.flatnonzero(mask)
    return sorted({int(at[i]) for i in np.linspace(0, len(at) - 1, count).astype(int)}) if len(at) else []


def _rows(cells: Sequence[Cell], found: dict[Path, dict[str, np.ndarray]], opener: Opener) -> list[dict[str, object]]:
    """Return one row a run and image."""
    rows: list[dict[str, object]] = []
    for cell in cells:
        for run in cell.runs:
            images, scores = opener.images(run), found[run.directory]
            for i, (index, label) in enumerate(zip(images.indices.tolist(), images.labels.tolist(), strict=True)):
                row = cell.columns | {
                    "seed": run.seed,
                    "image": index,
                    "label": label,
                    "predicted": int(scores["predicted"][i]),
                }
                row |= {k: float(scores[k][i]) for k in (*JUDGED, *DESCRIBED) if k in scores}
                rows.append(row)
    return rows

"""Draw an ABN channel and its two integer thresholds for docs/deploy.md, into docs/figures/abn_thresholds.png."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from abn_exp.deploy.fold import fold
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.report import figures

LIMIT, MEAN, DEVIATION, BETA = 72, 6.0, 17.0, 0.2  # a 3x3 convolution of 8 channels

if __name__ == "__main__":
    norm = AttentionBatchNorm2d(1).eval().requires_grad_(False)
    norm.running_mean, norm.running_var = torch.tensor([MEAN]), torch.tensor([DEVIATION**2])
    norm.bias.data = torch.tensor([BETA])
    found = fold(norm, 1, LIMIT)
    low, high = found.thresholds[0].tolist()
    sums = np.arange(-LIMIT, LIMIT + 1, 2)  # of an even number of products
    values = norm(torch.from_numpy(sums).float().view(1, 1, 1, -1)).flatten().numpy()
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        ax = figure.add_subplot()
        positive = found.signs(sums[None, None])[0, 0]
        for which, color, marker, label in (
            (positive, figures.BLUE, "o", "sign +1"),
            (~positive, figures.VERMILLION, "s", f"sign $-$1: {low} $\\leq$ y < {high}"),
        ):
            ax.plot(sums[which], values[which], marker, color=color, markersize=3.5, label=label)
        ax.axhline(0, color="0.6", linewidth=0.8)
        for threshold in (low, high):
            ax.axvline(threshold - 0.5, color="0.6", linestyle="--", linewidth=0.8)
        ax.set(
            xlabel="sum y of the binary convolution", ylabel="SiLU(xhat) + beta", ylim=(-0.15, 0.75), xlim=(-74, 30)
        )
        ax.legend(loc="upper left")
        figure.savefig(Path(__file__).parents[1] / "docs/figures/abn_thresholds.png", dpi=150)

"""One effect over several cells: each seed averaged over the cells, and a random-effects mean of the cells'
differences.

The cells of a study share their seeds, so the seed is the unit that repeats: the first way averages the differences
of a seed over the cells and puts these averages to a paired t test. Its interval is for the same cells with new
seeds. The second takes each cell as a draw from what could have been studied: with y_i the cell's mean difference and
v_i its squared standard error,

    Q = sum w_i (y_i - ybar)^2, w_i = 1 / v_i        tau^2 = max(0, (Q - (k - 1)) / (sum w_i - sum w_i^2 / sum w_i))
    mean = sum u_i y_i / sum u_i, u_i = 1 / (v_i + tau^2)        I^2 = max(0, 1 - (k - 1) / Q)

(DerSimonian and Laird 1986). Its interval takes the cells as independent, which shared seeds make only nearly true.
Hartung and Knapp's interval, for few cells, has the variance sum u_i (y_i - mean)^2 / ((k - 1) sum u_i) and Student's
t with k - 1 degrees of freedom.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as st

from abn_exp.report.stats import CONFIDENCE, NAN, Interval


@dataclass(frozen=True)
class RandomEffects:
    """The mean over k cells, in their unit, and how much the cells differ beyond what their own errors explain."""

    k: int
    mean: float
    interval: Interval  # normal, with DerSimonian and Laird's variance
    interval_hartung_knapp: Interval
    tau: float  # standard deviation between cells' true differences
    q: float
    p_q: float  # of no heterogeneity: chi-square with k - 1 degrees of freedom
    i_squared: float  # share of the variance between cells that is not their own errors'


def random_effects(means: ArrayLike, standard_errors: ArrayLike) -> RandomEffects | None:
    """Return the random-effects mean; cells without a standard error are left out. None for fewer than two."""
    y, s = np.asarray(means, dtype=np.float64), np.asarray(standard_errors, dtype=np.float64)
    usable = ~np.isnan(y) & (s > 0)
    y, w = y[usable], 1 / s[usable] ** 2
    k = len(y)
    if k < 2:
        return None
    q = float(w @ (y - w @ y / w.sum()) ** 2)
    tau_squared = max(0.0, (q - (k - 1)) / (w.sum() - w @ w / w.sum()))
    u = 1 / (1 / w + tau_squared)
    mean = float(u @ y / u.sum())
    half = st.norm.isf((1 - CONFIDENCE) / 2) / math.sqrt(u.sum())
    spread = u @ (y - mean) ** 2 / ((k - 1) * u.sum())
    half_knapp = st.t.isf((1 - CONFIDENCE) / 2, k - 1) * math.sqrt(spread)
    return RandomEffects(
        k=k,
        mean=mean,
        interval=(mean - half, mean + half),
        interval_hartung_knapp=(mean - half_knapp, mean + half_knapp),
        tau=math.sqrt(tau_squared),
        q=q,
        p_q=float(st.chi2.sf(q, k - 1)),
        i_squared=max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0 if q == 0 else NAN,
    )

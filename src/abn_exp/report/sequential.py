"""Group-sequential t tests: the level of each look, so that a test keeps its error over all looks together.

A one-sided one-sample t test of level alpha is looked at when n_1 < n_2 < ... < n_K values are there. A spending
function a(t) of the share t = n / n_K, with a(1) = alpha, says how much of alpha may be used until then (Lan and
DeMets 1983). The levels p_k of the looks are those with

    P(T_1 <= c_1, ..., T_{k-1} <= c_{k-1}, T_k > c_k) = a(t_k) - a(t_{k-1}),    c_k the t quantile of 1 - p_k

under independent normal values of mean zero, computed and not taken from the normal limit, which errs by up to 5 % of
alpha at five to twenty values.

How: r = sum x / sqrt(n sum x^2) lies in [-1, 1], and t = r sqrt(n - 1) / sqrt(1 - r^2). r does not depend on sum x^2
(Basu), so r_1, r_2, ... is a Markov chain: with m new values, whose own r is c, and B = the share of the older values
in sum x^2, a Beta(n / 2, m / 2) variable,

    r' = (sqrt(n B) r + sqrt(m (1 - B)) c) / sqrt(n + m),    r, B and c independent.

The distribution of r below the boundaries is carried on from look to look, in cells.
"""

import itertools
import math
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special
from scipy import stats as st
from scipy.optimize import brentq

from abn_exp.report.stats import Array

Spending = Literal["obrien_fleming", "pocock"]

CELLS = 200
NODES = 24
SMALLEST = 1e-15  # level of a look; an r much further out cannot be told from 1
LOWEST = -7.0  # where the lowest cell ends, as a standard normal quantile


def spent(share: float, alpha: float, spending: Spending) -> float:
    """Return a(t), the part of the one-sided ``alpha`` that may be used when the share t of the sample is there.

    O'Brien and Fleming's type: 2 - 2 Phi(z(1 - alpha / 2) / sqrt(t)), little early and almost all at the end.
    Pocock's type: alpha ln(1 + (e - 1) t), about the same level at every look.
    """
    if spending == "obrien_fleming":
        return float(2 * st.norm.sf(st.norm.isf(alpha / 2) / math.sqrt(share)))
    return alpha * math.log1p((math.e - 1) * share)


@lru_cache(maxsize=64)
def nominal_levels(looks: tuple[int, ...], alpha: float, spending: Spending) -> tuple[float, ...]:
    """Return the one-sided level of the t test at each look; the last of ``looks`` is the planned sample.

    Raises ValueError where looks do not increase from 2, or where a look has next to nothing to spend.
    """
    if not looks or looks[0] < 2 or any(a >= b for a, b in itertools.pairwise(looks)):
        raise ValueError(f"Looks are increasing numbers of values, from 2; got {list(looks)}.")
    levels: list[float] = []
    used, walk = 0.0, None
    for n in looks:
        now = spent(n / looks[-1], alpha, spending)
        target, used = now - used, now
        if target < SMALLEST:
            raise ValueError(f"The look at {n} of {looks[-1]} values has no error to spend; look later.")
        if walk is None:
            z = float(st.norm.isf(target))
        else:
            z = float(brentq(walk.excess, 0.0, 12.0, (n, target), xtol=1e-9))
        levels.append(float(st.norm.sf(z)))
        if n != looks[-1]:
            walk = _Chain.first(n, z) if walk is None else walk.advance(n, z)
    return tuple(levels)


class _Chain:
    """The distribution of r after n values, where no boundary was passed: a mass at the middle of each cell."""

    def __init__(self, n: int, r: Array, mass: Array) -> None:
        self.n, self.r, self.mass = n, r, mass

    @classmethod
    def first(cls, n: int, z: float) -> "_Chain":
        edges = np.concatenate([[-np.inf], np.linspace(LOWEST, z, CELLS)])
        return cls(n, _middles(edges, n), np.diff(st.norm.cdf(edges)))

    def excess(self, z: float, n: int, target: float) -> float:
        """Return P(passing level 1 - Phi(z) at ``n`` values, and no boundary before) - ``target``."""
        return float(self.mass @ self._above(n, _r_of(np.array([z]), n))[:, 0]) - target

    def advance(self, n: int, z: float) -> "_Chain":
        edges = np.concatenate([[-np.inf], np.linspace(LOWEST, z, CELLS)])
        above = self.mass @ self._above(n, _r_of(edges, n))
        return _Chain(n, _middles(edges, n), -np.diff(above))

    def _above(self, n: int, bounds: Array) -> Array:
        """Return P(r' > bound | r) after ``n`` values, (num_cells, num_bounds)."""
        m = n - self.n
        if m == 1:
            return self._above_after_one(n, bounds)
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        low, high = st.beta.ppf([1e-13, 1 - 1e-13], self.n / 2, m / 2)
        ends = math.acos(math.sqrt(high)), math.acos(math.sqrt(low))
        angle = ends[0] + (ends[1] - ends[0]) * (nodes + 1) / 2  # B = cos^2 of it
        log_weights = (self.n - 1) * np.log(np.cos(angle)) + (m - 1) * np.log(np.sin(angle))
        weights = weights * np.exp(log_weights - log_weights.max())
        old = math.sqrt(self.n) * self.r[:, None, None] * np.cos(angle)
        c = np.clip((math.sqrt(n) * bounds[:, None] - old) / (math.sqrt(m) * np.sin(angle)), -1, 1)
        tail = special.betainc((m - 1) / 2, 0.5, 1 - c**2) / 2  # of t with m - 1 df, in terms of r
        return np.asarray(np.where(c > 0, tail, 1 - tail) @ (weights / weights.sum()))

    def _above_after_one(self, n: int, bounds: Array) -> Array:
        """The same after one value more, whose r is -1 or 1: sqrt(n) r' = length cos(theta - phi) with B = cos^2
        theta, 0 <= theta <= pi / 2, is above a bound where theta - phi, up to a whole turn, is at most ``reach``."""
        total = np.zeros((len(self.r), len(bounds)))
        for c in (-1.0, 1.0):
            x, y = math.sqrt(self.n) * self.r[:, None], np.full((len(self.r), 1), c)
            reach = np.arccos(np.clip(math.sqrt(n) * bounds / np.hypot(x, y), -1, 1))
            for turn in (0, 2 * np.pi):
                low, high = (np.clip(np.arctan2(y, x) + turn + sign * reach, 0, np.pi / 2) for sign in (-1, 1))
                share = special.betainc(0.5, self.n / 2, np.sin(high) ** 2)  # of 1 - B
                total += (share - special.betainc(0.5, self.n / 2, np.sin(low) ** 2)) / 2
        return total


def _r_of(z: Array, n: int) -> Array:
    """Return the r whose t has the standard normal quantile z's level."""
    t = np.where(z < 0, -1.0, 1.0) * st.t.isf(st.norm.sf(np.abs(z)), n - 1)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(t), np.sign(t), t / np.sqrt(t**2 + n - 1))


def _middles(edges: Array, n: int) -> Array:
    return _r_of(np.concatenate([edges[1:2], (edges[1:-1] + edges[2:]) / 2]), n)

"""Simulate error rates and power of the report's verdicts, and write the tables of docs/statistics.md.

    python -m benchmarks.error_rates --write docs/statistics.md

A sample is n seeds of a candidate and a reference, in points; the two scores of a seed have a correlation of 0.5,
their difference a standard deviation of SD_OF_DIFFERENCES. The verdicts are those of abn_exp.report.verdicts, in
arrays; a test compares the two.
"""

import argparse
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats as st

from abn_exp.files import write_text_atomic
from abn_exp.report.formatting import markdown_table, replace_between
from abn_exp.report.pooled import random_effects
from abn_exp.report.sequential import Spending, nominal_levels
from abn_exp.report.spread import MIN_PAIRS, random_swaps, rejection_rate, swap_p
from abn_exp.report.stats import ALPHA, Array

Bools = NDArray[np.bool_]

DELTA = 0.5  # points
SD_OF_DIFFERENCES = 0.65  # points; .35 to .8 was found
CHANCE = -60.0  # a score at chance, points from a run's usual score: 10 % against 70 %
LOOKS = (5, 10, 20)
NAMES = ("undecided", "equivalent", "better", "worse", "not better by delta", "not worse by delta")
EACH = (*NAMES[1:], NAMES[0])  # in a table's order
UNDECIDED, EQUIVALENT, BETTER, WORSE, NOT_BETTER, NOT_WORSE = range(6)
SHAPES = {"normal": "normal", "t3": "t, 3 df", "crash": "crash-prone"}
FAILURES = {"none": "none", "random": "10 % of all runs", "worst": "the candidate's worst 20 %"}


@dataclass(frozen=True)
class Design:
    """Looks with the level of the two-sided test and that of each test against delta."""

    name: str
    looks: tuple[int, ...]
    levels: tuple[float, ...]
    levels_delta: tuple[float, ...]


def designs() -> list[Design]:
    found = [Design(f"n = {n}", (n,), (ALPHA,), (ALPHA,)) for n in (3, 5, 10, 20)]
    spendings: dict[str, Spending] = {"O'Brien-Fleming": "obrien_fleming", "Pocock": "pocock"}
    for name, spending in spendings.items():
        two_sided = tuple(2 * p for p in nominal_levels(LOOKS, ALPHA / 2, spending))
        found.append(Design(f"until decided, {name}", LOOKS, two_sided, nominal_levels(LOOKS, ALPHA, spending)))
    return found


def draw(shape: str, draws: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return scores of the candidate and the reference, (draws, 20) each, with equal distributions."""

    def noise() -> Array:
        size = (draws, LOOKS[-1])
        if shape == "t3":
            return rng.standard_t(3, size) / math.sqrt(3)
        z = rng.standard_normal(size)
        if shape == "crash":  # one draw in ten is four standard deviations lower
            z -= 4 * (rng.random(size) < 0.1)
        return z

    shared = noise()
    return tuple(SD_OF_DIFFERENCES * math.sqrt(0.5) * (shared + noise()) for _ in range(2))  # type: ignore[return-value]


def fail(kind: str, x: Array, y: Array, rng: np.random.Generator) -> tuple[Bools, Bools]:
    """Return which runs of the candidate and of the reference failed."""
    if kind == "random":
        return rng.random(x.shape) < 0.1, rng.random(y.shape) < 0.1
    none = np.zeros(x.shape, bool)
    return (x < np.quantile(x, 0.2), none) if kind == "worst" else (none, none)


def t_statistics(d: Array, there: Bools) -> tuple[Array, Array, Array, NDArray[np.intp]]:
    """Return the t statistics against 0, DELTA and -DELTA and their degrees of freedom."""
    n = there.sum(axis=1)
    mean = np.where(there, d, 0).sum(axis=1) / np.maximum(n, 1)
    squares = (np.where(there, d - mean[:, None], 0) ** 2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(squares / (n - 1) / n)
        return mean / error, (mean - DELTA) / error, (mean + DELTA) / error, n - 1


def decide(d: Array, x_failed: Bools, y_failed: Bools, level: float, level_delta: float) -> NDArray[np.intp]:
    """Return the verdict on each row of differences, as an index of NAMES."""
    scored = np.where(x_failed & y_failed, 0.0, np.where(x_failed, CHANCE, np.where(y_failed, -CHANCE, d)))
    tests = t_statistics(d, ~(x_failed | y_failed))
    at_chance = t_statistics(scored, np.ones(d.shape, bool))
    tables = [_critical(level / 2, d.shape[1]), _critical(level_delta, d.shape[1])]

    def rejected(t: tuple[Array, Array, Array, NDArray[np.intp]]) -> list[Bools]:
        two_sided, one_sided = (table[np.maximum(t[3], 0)] for table in tables)
        return [t[0] > two_sided, t[0] < -two_sided, t[1] < -one_sided, t[2] > one_sided]

    better, worse, not_better, not_worse = rejected(tests)
    also = rejected(at_chance)
    candidate, reference = (failed.sum(axis=1) for failed in (x_failed, y_failed))
    better &= also[0] | (candidate <= reference)
    not_worse &= also[3] | (candidate <= reference)
    worse &= also[1] | (candidate >= reference)
    not_better &= also[2] | (candidate >= reference)
    conditions = [not_better & not_worse, better, worse, not_better, not_worse]
    return np.select(conditions, [EQUIVALENT, BETTER, WORSE, NOT_BETTER, NOT_WORSE], UNDECIDED)


def _critical(level: float, n: int) -> Array:
    """Return Student's upper quantile for 0, 1, ..., n degrees of freedom; infinite at 0."""
    return np.array([math.inf, *st.t.isf(level, np.arange(1, n + 1))])


def run_design(
    design: Design, d: Array, x_failed: Bools, y_failed: Bools
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return each row's verdict and the seeds that it took."""
    verdict = np.full(len(d), UNDECIDED)
    seeds = np.full(len(d), design.looks[-1])
    for n, level, level_delta in zip(design.looks, design.levels, design.levels_delta, strict=True):
        open_ = np.flatnonzero(verdict == UNDECIDED)
        verdict[open_] = decide(d[open_, :n], x_failed[open_, :n], y_failed[open_, :n], level, level_delta)
        seeds[open_[verdict[open_] != UNDECIDED]] = n
    return verdict, seeds


@dataclass(frozen=True)
class Rates:
    """Error rates and power: shares of samples, for true differences of 0, delta and -delta."""

    differs: float  # better or worse, at 0; nominal 5 %
    better: float  # better, at 0; nominal 2.5 %
    at_delta: float  # equivalent, worse or not better by delta, at delta; nominal 5 %
    at_minus_delta: float  # equivalent, better or not worse by delta, at -delta; nominal 5 %
    seeds: tuple[float, float]  # mean number, at 0 and at delta
    shares: dict[str, tuple[float, float]]  # of each verdict, at 0 and at delta


def rates(design: Design, shape: str, failures: str, draws: int, rng: np.random.Generator) -> Rates:
    x, y = draw(shape, draws, rng)
    failed = fail(failures, x, y, rng)
    found = {shift: run_design(design, x - y + shift, *failed) for shift in (0.0, DELTA, -DELTA)}

    def share(shift: float, *verdicts: int) -> float:
        return float(np.isin(found[shift][0], verdicts).mean())

    return Rates(
        differs=share(0, BETTER, WORSE),
        better=share(0, BETTER),
        at_delta=share(DELTA, EQUIVALENT, WORSE, NOT_BETTER),
        at_minus_delta=share(-DELTA, EQUIVALENT, BETTER, NOT_WORSE),
        seeds=(float(found[0.0][1].mean()), float(found[DELTA][1].mean())),
        shares={name: (share(0, i), share(DELTA, i)) for i, name in enumerate(NAMES)},
    )


def too_high(r: Rates, draws: int) -> list[str]:
    """Name the error rates above their nominal level by more than the simulation's error."""
    nominal = {"differs": ALPHA, "better": ALPHA / 2, "at_delta": ALPHA, "at_minus_delta": ALPHA}
    return [name for name, p in nominal.items() if getattr(r, name) > p + 3 * math.sqrt(p * (1 - p) / draws)]


def unguarded_looks(draws: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Return how often looks without a plan, each at 5 %, find a difference that is not there."""
    x, y = draw("normal", draws, rng)
    found = []
    for name, looks in (("3, 5, 10, 20 seeds", (3, 5, 10, 20)), ("each seed from 3 to 20", tuple(range(3, 21)))):
        differs = np.zeros(draws, bool)
        for n in looks:
            t, _, _, df = t_statistics((x - y)[:, :n], np.ones((draws, n), bool))
            differs |= np.abs(t) > _critical(ALPHA / 2, n)[df]
        found.append((name, float(differs.mean())))
    return found


def random_effects_coverage(draws: int, rng: np.random.Generator) -> list[list[str]]:
    """Return how often the intervals of a random-effects mean hold the truth: k cells of 5 seeds each."""
    rows = []
    for k in (2, 6):
        for tau in (0.0, 0.3):
            for shared in (0.0, 0.3):
                hits = np.zeros(2)
                for _ in range(draws):
                    common = math.sqrt(shared) * rng.standard_normal((5, 1))
                    d = SD_OF_DIFFERENCES * (common + math.sqrt(1 - shared) * rng.standard_normal((5, k)))
                    d += tau * rng.standard_normal(k)
                    found = random_effects(d.mean(axis=0), d.std(axis=0, ddof=1) / math.sqrt(5))
                    assert found is not None
                    for i, (low, high) in enumerate((found.interval, found.interval_hartung_knapp)):
                        hits[i] += low < 0 < high
                rows.append([str(k), f"{tau:g}", f"{shared:g}", *(f"{100 * hit / draws:.1f}" for hit in hits)])
    return rows


def less_spread_after_losses(draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return how often equal spreads end as less spread of the candidate's, at 20 seeds and 5 %, where it loses its
    worst 20 %: without counting failures, and with."""
    x, y = draw("normal", draws, rng)
    failed = x < np.quantile(x, 0.2)
    swaps = {n: random_swaps(n, rng, 999) for n in range(MIN_PAIRS, LOOKS[-1] + 1)}

    def less(a: Array, b: Array) -> bool:
        return bool(a.var() < b.var() and len(a) in swaps and swap_p(a[None], b[None], swaps[len(a)])[0] < ALPHA)

    plain = [less(a[~f], b[~f]) for a, b, f in zip(x, y, failed, strict=True)]
    at_chance = [less(np.where(f, CHANCE, a), b) or not f.any() for a, b, f in zip(x, y, failed, strict=True)]
    return float(np.mean(plain)), float(np.mean(np.array(plain) & np.array(at_chance)))


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}"


def sections(draws: int, seed: int) -> Iterator[str]:
    """Yield the text of the simulation's results."""
    rng = np.random.default_rng(seed)
    errors, powers, verdicts, high = [], [], [], []
    for shape, shape_name in SHAPES.items():
        for failures, failures_name in FAILURES.items():
            for design in designs():
                r = rates(design, shape, failures, draws, rng)
                high += [f"{shape_name}, {failures_name}, {design.name}: {name}" for name in too_high(r, draws)]
                head = [f"{shape_name}; {failures_name}", design.name]
                numbers = (r.differs, r.better, r.at_delta, r.at_minus_delta)
                errors.append([*head, *map(_percent, numbers)])
                verdicts.append([*head, *(" / ".join(_percent(p, 1) for p in r.shares[name]) for name in EACH)])
                if failures == "none":
                    decided = (1 - p for p in r.shares["undecided"])
                    row = [_percent(p, 0) for p in (r.shares["better"][1], r.shares["equivalent"][0], *decided)]
                    powers.append([shape_name, design.name, *row, *(f"{n:.1f}" for n in r.seeds)])
    error = 100 * math.sqrt(ALPHA * (1 - ALPHA) / draws)
    yield (
        f"{draws:,} samples a row, so that a rate of 5 % has a simulation error of {error:.2f} points (one standard "
        f"error). Error rates above their nominal level by more than three of these: {'; '.join(high) or 'none'}."
    )
    header = ["scores; failures", "design", "better or worse, at 0 (5 %)", "better, at 0 (2.5 %)"]
    yield markdown_table(([*header, "false, at +delta (5 %)", "false, at -delta (5 %)"], errors), 2)
    yield "Power, without failures, in percent; and the mean number of seeds:"
    header = [
        "scores",
        "design",
        "better, at +delta",
        "equivalent, at 0",
        "any verdict, at 0",
        "any verdict, at +delta",
    ]
    yield markdown_table(([*header, "seeds, at 0", "seeds, at +delta"], powers), 2)
    yield "How often each verdict is reached, in percent, where there is no difference / where it is +delta:"
    yield markdown_table((["scores; failures", "design", *EACH], verdicts), 2)
    unguarded = (f"at {name} {100 * rate:.1f} %" for name, rate in unguarded_looks(draws, rng))
    yield f"Looks without a plan, each at 5 %, find a difference that is not there: {', '.join(unguarded)} of cases."
    yield "The spread test, in percent (correlation 0.5 in a pair; levels of 20,000 samples, power of 2,000):"
    rows = []
    for n in (10, 15, 20, 30):
        level = [rejection_rate(n, 1.0, shape=shape, draws=20_000) for shape in ("normal", "t3")]
        power = [rejection_rate(n, 2.0, p) for p in (ALPHA, ALPHA / 2, ALPHA / 4)]
        rows.append([str(n), *(_percent(p, 1) for p in level), *(_percent(p, 0) for p in power)])
    header = [
        "n",
        "level, normal",
        "level, t with 3 df",
        "power at ratio 2",
        "after halving the level",
        "at a quarter",
    ]
    yield markdown_table((header, rows), 2)
    yield "Coverage of the 95 % intervals of a random-effects mean, in percent, 5 seeds a cell (4,000 samples a row):"
    header = ["cells", "tau (points)", "correlation between cells", "DerSimonian-Laird", "Hartung-Knapp"]
    yield markdown_table((header, random_effects_coverage(4_000, rng)), 2)
    plain, guarded = (100 * rate for rate in less_spread_after_losses(4_000, rng))
    yield (
        f"Where the candidate loses its worst 20 %, the spread test at 20 seeds says less spread in {plain:.1f} % of "
        f"cases with equal spreads, and in {guarded:.1f} % where failures count (nominal 2.5 %; 4,000 samples)."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate error rates and power of the report's verdicts.")
    parser.add_argument("--draws", type=int, default=200_000, help="samples a row (default: 200,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file whose marked block is replaced")
    arguments = parser.parse_args()
    parts = sections(arguments.draws, arguments.seed)
    text = "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts)
    if arguments.write is None:
        print(text)
        return
    begin, end = "<!-- simulated: begin -->", "<!-- simulated: end -->"
    page = arguments.write.read_text(encoding="utf-8")
    write_text_atomic(arguments.write, replace_between(page, begin, end, f"\n{text}\n"))


if __name__ == "__main__":
    main()

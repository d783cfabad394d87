"""Differences that are not norm against reference: named contrasts of norms, and the effects of other factors.

All of them are percentage points, paired by seed where the seeds match, with Holm's correction over the rows of
their own table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from abn_exp.report import stats
from abn_exp.report.comparisons import (
    Cell,
    count_text,
    group_cells,
    interval_text,
    p_equation,
    p_text,
    signed_text,
    started_seeds,
)
from abn_exp.report.factors import Factor, describe_group

# (the part of the norm that makes the difference, the norm with it, the norm without it)
CONTRASTS = (
    ("the gate's forward shape", "abn_forward", "bn_noscale"),
    ("the shape of the gate's gradient", "abn_backward", "bn_noscale"),
    ("both: the gate", "abn", "bn_noscale"),
    ("a scale behind the gate", "abn_scale", "abn"),
    ("a scale inside the gate", "abn_gate", "abn"),
    ("a scale without a gate", "bn", "bn_noscale"),
    ("leaving out the shift", "abn_noshift", "abn"),
    ("the published running statistics", "abn_paper", "abn"),
)


@dataclass(frozen=True)
class Effect:
    """One row: what stands at its head, in words, and the difference. ``average`` is over ``contexts`` rows."""

    labels: tuple[str, ...]
    what: str  # the difference in words
    mean: stats.MeanComparison
    p_holm: float = stats.NAN
    contexts: int = 1

    @property
    def decision(self) -> str:
        if self.p_holm < stats.ALPHA:
            return "gain" if self.mean.difference > 0 else "loss"
        return "not decided"


@dataclass(frozen=True)
class EffectTable:
    title: str
    header: tuple[str, ...]  # of the effects' labels
    effects: tuple[Effect, ...]
    measure: str = "difference (points)"

    @property
    def averages(self) -> list[Effect]:
        return [effect for effect in self.effects if effect.contexts > 1]

    def summary(self) -> list[str]:
        """Return a sentence for each average, or for each row where nothing was averaged."""
        return [_sentence(effect) for effect in self.averages or self.effects]


def _sentence(effect: Effect) -> str:
    m = effect.mean
    where = f"averaged over {effect.contexts} rows" if effect.contexts > 1 else ""
    numbers = [f"95 % interval {interval_text(m.interval)}"] if not np.isnan(m.p) else []
    numbers += [f"n = {count_text(m)}"]
    numbers += [p_equation(m.p), f"Holm {p_text(effect.p_holm)}"] if not np.isnan(m.p) else []
    numbers += [where] if where else []
    size = "no common seeds" if np.isnan(m.difference) else f"{signed_text(m.difference)} points"
    return f"{effect.what} {size} ({', '.join(numbers)}): {effect.decision}."


def effect_tables(cells: Sequence[Cell], factors: Sequence[Factor], reference: str = "bn") -> list[EffectTable]:
    """Return the contrasts, then for each factor its effect and how the norms' differences change with it."""
    tables = [contrasts(cells, factors)]
    for factor in factors:
        tables += [factor_effects(cells, factors, factor), norm_interactions(cells, factors, factor, reference)]
    return [_corrected(table) for table in tables if table.effects]


def _corrected(table: EffectTable) -> EffectTable:
    adjusted = stats.holm([effect.mean.p for effect in table.effects])
    effects = (replace(effect, p_holm=p) for effect, p in zip(table.effects, adjusted, strict=True))
    return replace(table, effects=tuple(effects))


def contrasts(cells: Sequence[Cell], factors: Sequence[Factor] = ()) -> EffectTable:
    """Compare the pairs of norms of CONTRASTS, in each group that has both."""
    seeds, effects = started_seeds(cells), []
    for group in group_cells(cells).values():
        by_norm = {cell.norm: cell for cell in group if cell.scores["test_acc"]}
        head = (group[0].dataset, group[0].model, *_levels(group[0], factors))
        for what, norm, without in CONTRASTS:
            if norm in by_norm and without in by_norm:
                mean = _compare([by_norm[norm]], [by_norm[without]], seeds)
                difference = f"{norm} - {without}"
                sentence = f"On {describe_group(group[0], factors)}, {what} ({difference}):"
                effects.append(Effect((*head, what, difference), sentence, mean))
    header = ("dataset", "model", *(f.name for f in factors), "part", "difference")
    return EffectTable("What each part of the norm does", header, tuple(effects))


def factor_effects(cells: Sequence[Cell], factors: Sequence[Factor], factor: Factor) -> EffectTable:
    """Compare each level of a factor with its reference level in cells that are otherwise the same; and the mean
    over these, each seed's first."""
    others, seeds = _others(factors, factor), started_seeds(cells)
    contexts: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in cells:
        if cell.scores["test_acc"]:
            context = (cell.dataset, cell.model, cell.norm, *_levels(cell, others))
            contexts.setdefault(context, {})[factor.level(cell)] = cell
    effects = []
    for level in factor.levels[1:]:
        what = f"{factor.name} {level} instead of {factor.reference}:"
        matched = {c: at for c, at in contexts.items() if level in at and factor.reference in at}
        pairs = [(at[level], at[factor.reference]) for at in matched.values()]
        for context, (cell, base) in zip(matched, pairs, strict=True):
            effects.append(Effect((*context, level), f"With {context[2]}, {what}", _compare([cell], [base], seeds)))
        if len(pairs) > 1:
            mean = _compare([cell for cell, _ in pairs], [base for _, base in pairs], seeds)
            effects.append(Effect(_average(len(pairs), 3 + len(others), level), what, mean, contexts=len(pairs)))
    header = ("dataset", "model", "norm", *(f.name for f in others), factor.name)
    return EffectTable(f"Effect of {factor.name}, against {factor.reference}", header, tuple(effects))


def norm_interactions(
    cells: Sequence[Cell], factors: Sequence[Factor], factor: Factor, reference: str
) -> EffectTable:
    """Compare the difference norm - reference at each level of a factor with that at its reference level: a
    difference of differences, each seed's first.

    A norm is compared with itself; where each level has one norm alone that the other lacks, these two are.
    """
    others, seeds = _others(factors, factor), started_seeds(cells)
    contexts: dict[tuple[str, ...], dict[str, dict[str, Cell]]] = {}
    for cell in cells:
        if cell.scores["test_acc"]:
            at = contexts.setdefault((cell.dataset, cell.model, *_levels(cell, others)), {})
            at.setdefault(factor.level(cell), {})[cell.norm] = cell
    found: dict[tuple[str, str, str], dict[tuple[str, ...], list[Cell]]] = {}
    for level in factor.levels[1:]:
        for context, at in contexts.items():
            here, base = at.get(level, {}), at.get(factor.reference, {})
            if reference in here and reference in base:
                for norm, other in _matching_norms(here, base, reference):
                    four = [here[norm], here[reference], base[other], base[reference]]
                    found.setdefault((level, norm, other), {})[context] = four
    effects = []
    for (level, norm, other), rows in found.items():
        now = "" if norm == other else f"{norm} - {reference} "
        what = f"{other} - {reference} is {{}} points at {factor.name} {factor.reference}, {now}{{}} at {level}"
        last = (" or ".join(f"{name} - {reference}" for name in dict.fromkeys((other, norm))), level)
        for context, four in rows.items():
            effects.append(_change((*context, *last), what, [four], seeds))
        if len(rows) > 1:
            effects.append(_change(_average(len(rows), 2 + len(others), *last), what, list(rows.values()), seeds))
    header = ("dataset", "model", *(f.name for f in others), "difference", factor.name)
    header += (f"at {factor.reference}", "there")
    return EffectTable(f"How the difference to {reference} changes with {factor.name}", header, tuple(effects))


def _change(head: tuple[str, ...], what: str, rows: Sequence[Sequence[Cell]], seeds: Sequence[int]) -> Effect:
    here, base = (
        np.mean([row[i].sample("test_acc", seeds) - row[i + 1].sample("test_acc", seeds) for row in rows], axis=0)
        for i in (0, 2)
    )
    sizes = [signed_text(float(stats.present(d).mean())) if stats.present(d).size else "-" for d in (base, here)]
    mean = stats.compare_means(here, base, np.random.default_rng(0), scale=100)
    return Effect((*head, *sizes), f"{what.format(*sizes)}, a change of", mean, contexts=len(rows))


def _matching_norms(here: Mapping[str, Cell], base: Mapping[str, Cell], reference: str) -> list[tuple[str, str]]:
    pairs = [(norm, norm) for norm in here if norm in base and norm != reference]
    alone = [norm for norm in here if norm not in base], [norm for norm in base if norm not in here]
    return pairs + ([(alone[0][0], alone[1][0])] if len(alone[0]) == len(alone[1]) == 1 else [])


def _compare(cells: Sequence[Cell], bases: Sequence[Cell], seeds: Sequence[int]) -> stats.MeanComparison:
    """Compare the means over cells, each seed's first; a seed that one cell lacks is left out."""
    pair = [np.mean([cell.sample("test_acc", seeds) for cell in side], axis=0) for side in (cells, bases)]
    return stats.compare_means(pair[0], pair[1], np.random.default_rng(0))


def _others(factors: Iterable[Factor], factor: Factor) -> list[Factor]:
    return [other for other in factors if other is not factor]


def _levels(cell: Cell, factors: Iterable[Factor]) -> tuple[str, ...]:
    return tuple(factor.level(cell) for factor in factors)


def _average(contexts: int, columns: int, *last: str) -> tuple[str, ...]:
    """Return the labels of an average, in a table with so many columns before ``last``."""
    return (f"mean of {contexts}", *[""] * (columns - 1), *last)

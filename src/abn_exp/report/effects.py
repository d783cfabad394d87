"""Differences that are not norm against reference: contrasts of norms, the 2 x 2 of the gate, effects of other
factors.

All of them are percentage points, paired by seed where the seeds match, and exploratory. Holm's correction is over
the rows of a table; its averages are a family of their own.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from abn_exp.report import stats
from abn_exp.report.comparisons import Cell, Key, compare, failed_alone, group_cells, one_kind_each, started_seeds
from abn_exp.report.factors import Factor, describe_group
from abn_exp.report.formatting import signed_text
from abn_exp.report.verdicts import Judgement, Tested, judge, sentence

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


# The gate's 2 x 2: (neither, its forward shape alone, the shape of its gradient alone, both)
FACTORIAL = ("bn_noscale", "abn_forward", "abn_backward", "abn")
# What was published: this norm with this momentum of the running statistics against that one with that
PUBLISHED = (("abn", "0.9"), ("bn", "0.1"))


@dataclass(frozen=True)
class Effect:
    """One row: what stands at its head, in words, and the difference. An average has ``contexts`` > 1."""

    labels: tuple[str, ...]
    what: str  # the difference in words
    judgement: Judgement
    contexts: int = 1

    @property
    def sentence(self) -> str:
        return sentence(self.judgement, self.what, ("what is added", "what is subtracted"))


@dataclass(frozen=True)
class EffectTable:
    title: str
    header: tuple[str, ...]  # of the effects' labels
    effects: tuple[Effect, ...]

    @property
    def averages(self) -> list[Effect]:
        return [effect for effect in self.effects if effect.contexts > 1]

    def summary(self) -> list[str]:
        """Return a sentence for each average, or for each row where nothing was averaged."""
        return [effect.sentence for effect in self.averages or self.effects]


Row = tuple[tuple[str, ...], str, Tested, int]  # labels, what, the difference, contexts


def effect_tables(
    cells: Sequence[Cell],
    factors: Sequence[Factor],
    reference: str,
    delta: float,
    judged: Collection[frozenset[Key]],
) -> list[EffectTable]:
    """Return the contrasts and the 2 x 2 of norms, then for each factor its effect and how the norms' differences
    change with it; and the published pairing where the factors hold it. ``judged`` are the pairs of cells that were
    judged as primary: they are not judged again among the contrasts."""
    ended = [cell for cell in cells if cell.ended]
    tables = [contrasts(ended, factors, judged), factorial(ended, factors)]
    for factor in factors:
        tables += [factor_effects(ended, factors, factor), norm_interactions(ended, factors, factor, reference)]
        tables += [published_pairing(ended, factors, factor)]
    return [_judged(title, header, rows, delta) for title, header, rows in tables if rows]


def _judged(title: str, header: tuple[str, ...], rows: Sequence[Row], delta: float) -> EffectTable:
    judged: dict[int, Judgement] = {}
    for average in (False, True):
        family = [i for i, row in enumerate(rows) if (row[3] > 1) == average]
        judged |= dict(zip(family, judge([rows[i][2] for i in family], delta), strict=True))
    effects = (Effect(labels, what, judged[i], n) for i, (labels, what, _, n) in enumerate(rows))
    return EffectTable(title, header, tuple(effects))


Unjudged = tuple[str, tuple[str, ...], list[Row]]  # title, header, rows


def contrasts(cells: Sequence[Cell], factors: Sequence[Factor], judged: Collection[frozenset[Key]]) -> Unjudged:
    """Compare the pairs of norms of CONTRASTS, in each group that has both; without those of ``judged``."""
    rows: list[Row] = []
    for group in group_cells(cells).values():
        by_norm = {cell.norm: cell for cell in group}
        head = (group[0].dataset, group[0].model, *_levels(group[0], factors))
        for what, norm, without in CONTRASTS:
            if norm not in by_norm or without not in by_norm:
                continue
            cell, base = by_norm[norm], by_norm[without]
            if frozenset((cell.key, base.key)) not in judged:
                difference = f"{norm} - {without}"
                text = f"On {describe_group(group, factors)}, {what} ({difference})"
                rows.append(((*head, what, difference), text, compare([cell], [base], started_seeds(cells)), 1))
    header = ("dataset", "model", *(f.name for f in factors), "part", "difference")
    return "What each part of the norm does", header, rows


def factorial(cells: Sequence[Cell], factors: Sequence[Factor]) -> Unjudged:
    """Compute the main effects of the gate's forward shape and of its gradient's shape, and their interaction, from
    the four norms of FACTORIAL: with f and g for the two, (f + fg - 0 - g) / 2, (g + fg - 0 - f) / 2, fg - g - f +
    0."""
    rows: list[Row] = []
    seeds = started_seeds(cells)
    for group in group_cells(cells).values():
        by_norm = {cell.norm: cell for cell in group}
        if not set(FACTORIAL) <= by_norm.keys():
            continue
        none, forward, backward, both = (by_norm[norm] for norm in FACTORIAL)
        found = {
            "the gate's forward shape": compare([forward, both], [none, backward], seeds),
            "the shape of the gate's gradient": compare([backward, both], [none, forward], seeds),
            "interaction": compare_changes([[both, backward, forward, none]], seeds),
        }
        head = (group[0].dataset, group[0].model, *_levels(group[0], factors))
        where = f"On {describe_group(group, factors)}"
        for what, tested in found.items():
            text = f"{where}, the interaction of both" if what == "interaction" else f"{where}, {what}, main effect,"
            rows.append(((*head, what), text, tested, 1))
    header = ("dataset", "model", *(f.name for f in factors), "effect")
    return "The gate's forward pass and its gradient, as a 2 x 2", header, rows


def published_pairing(cells: Sequence[Cell], factors: Sequence[Factor], factor: Factor) -> Unjudged:
    """Compare the norms of PUBLISHED, each with its own momentum, in cells that are otherwise the same, and on
    average.

    Of use where momentum is crossed with the norms: the published comparison is then between two groups.
    """
    rows: list[Row] = []
    (norm, momentum), (other, other_momentum) = PUBLISHED
    others = _others(factors, factor)
    title = f"The published pairing: {norm} at momentum {momentum} against {other} at {other_momentum}"
    header = ("dataset", "model", *(f.name for f in others))
    if factor.name != "norm.momentum":
        return title, header, rows
    contexts: dict[tuple[str, ...], dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        context = (cell.dataset, cell.model, *_levels(cell, others))
        contexts.setdefault(context, {})[cell.norm, factor.level(cell)] = cell
    matched = {c: (at[PUBLISHED[0]], at[PUBLISHED[1]]) for c, at in contexts.items() if set(PUBLISHED) <= at.keys()}
    what = f"{norm} at momentum {momentum} - {other} at {other_momentum}"
    for context, (cell, base) in matched.items():
        rows.append((context, f"With {', '.join(context)}, {what}", compare([cell], [base], started_seeds(cells)), 1))
    if len(matched) > 1 and one_kind_each(*zip(*matched.values(), strict=True)):
        candidates, references = zip(*matched.values(), strict=True)
        mean = compare(candidates, references, started_seeds(cells))
        rows.append(
            (_average(len(matched), 2 + len(others)), f"{what}, over {len(matched)} rows", mean, len(matched))
        )
    return title, header, rows


def factor_effects(cells: Sequence[Cell], factors: Sequence[Factor], factor: Factor) -> Unjudged:
    """Compare each level of a factor with its reference level in cells that are otherwise the same; and the mean
    over these, each seed's first."""
    others, seeds = _others(factors, factor), started_seeds(cells)
    contexts: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in cells:
        context = (cell.dataset, cell.model, cell.norm, *_levels(cell, others))
        contexts.setdefault(context, {})[factor.level(cell)] = cell
    rows: list[Row] = []
    for level in factor.levels[1:]:
        what = f"{factor.name} {level} instead of {factor.reference}"
        matched = {c: at for c, at in contexts.items() if level in at and factor.reference in at}
        pairs = [(at[level], at[factor.reference]) for at in matched.values()]
        for context, (cell, base) in zip(matched, pairs, strict=True):
            where = f"With {_told_apart(context, matched, others, always=2)}, {what}"
            rows.append(((*context, level), where, compare([cell], [base], seeds), 1))
        if len(pairs) > 1 and one_kind_each(*zip(*pairs, strict=True)):
            mean = compare([cell for cell, _ in pairs], [base for _, base in pairs], seeds)
            labels = _average(len(pairs), 3 + len(others), level)
            rows.append((labels, f"{what}, over {len(pairs)} rows,", mean, len(pairs)))
    header = ("dataset", "model", "norm", *(f.name for f in others), factor.name)
    return f"Effect of {factor.name}, against {factor.reference}", header, rows


def norm_interactions(cells: Sequence[Cell], factors: Sequence[Factor], factor: Factor, reference: str) -> Unjudged:
    """Compare the difference norm - reference at each level of a factor with that at its reference level: a
    difference of differences, each seed's first.

    A norm is compared with itself; where each level has one norm alone that the other lacks, these two are.
    """
    others, seeds = _others(factors, factor), started_seeds(cells)
    contexts: dict[tuple[str, ...], dict[str, dict[str, Cell]]] = {}
    for cell in cells:
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
    rows: list[Row] = []
    for (level, norm, other), matched in found.items():
        now = "" if norm == other else f"{norm} - {reference} "
        what = f"{other} - {reference} is {{}} points at {factor.name} {factor.reference}, {now}{{}} at {level}"
        last = (" or ".join(f"{name} - {reference}" for name in dict.fromkeys((other, norm))), level)
        for context, four in matched.items():
            where = f"With {told}, {what}" if (told := _told_apart(context, matched, others)) else what
            rows.append(_change((*context, *last), where, [four], seeds))
        if len(matched) > 1 and one_kind_each(*zip(*matched.values(), strict=True)):
            labels = _average(len(matched), 2 + len(others), *last)
            rows.append(_change(labels, what, list(matched.values()), seeds))
    header = ("dataset", "model", *(f.name for f in others), "difference", factor.name)
    header += (f"at {factor.reference}", "there")
    return f"How the difference to {reference} changes with {factor.name}", header, rows


def _change(head: tuple[str, ...], what: str, rows: Sequence[Sequence[Cell]], seeds: Sequence[int]) -> Row:
    change = compare_changes(rows, seeds)
    here, base = _two_differences(rows, lambda cell: cell.sample("test_acc", seeds))
    if change.mean.method == "paired":  # then it is of the seeds that both have
        common = ~np.isnan(here + base)
        here, base = here[common], base[common]
    sizes = [signed_text(float(stats.present(d).mean())) if stats.present(d).size else "-" for d in (base, here)]
    return (*head, *sizes), f"{what.format(*sizes)}; the change", change, len(rows)


def compare_changes(rows: Sequence[Sequence[Cell]], seeds: Sequence[int]) -> Tested:
    """Compare two differences of cells, a - b with c - d, over rows (a, b, c, d), each seed's mean over rows first.

    What failed in a or d counts as the candidate's, what failed in b or c as the reference's: at chance it would
    lower, or raise, the change.
    """
    mean = _compare_differences(rows, lambda cell: cell.sample("test_acc", seeds))
    added, subtracted = (
        sum(len(row[i].failed & set(seeds)) for row in rows for i in places) for places in ((0, 3), (1, 2))
    )
    at_chance = None
    failing, others = ([row[i] for row in rows for i in places] for places in ((0, 3), (1, 2)))
    if added < subtracted:
        failing, others = others, failing
    if added != subtracted and failed_alone(failing, others, seeds):
        at_chance = stats.compare_means([], [], np.random.default_rng(0))
    elif added != subtracted:
        at_chance = _compare_differences(rows, lambda cell: cell.sample_at_chance(seeds))
    return Tested(mean, (added, subtracted), at_chance)


def _compare_differences(
    rows: Sequence[Sequence[Cell]], scores: Callable[[Cell], stats.Array]
) -> stats.MeanComparison:
    return stats.compare_means(*_two_differences(rows, scores), np.random.default_rng(0), scale=100)


def _two_differences(
    rows: Sequence[Sequence[Cell]], scores: Callable[[Cell], stats.Array]
) -> tuple[stats.Array, stats.Array]:
    """Return a - b and c - d, each seed's mean over the rows (a, b, c, d)."""
    here, base = (np.mean([scores(row[i]) - scores(row[i + 1]) for row in rows], axis=0) for i in (0, 2))
    return here, base


def _matching_norms(here: Mapping[str, Cell], base: Mapping[str, Cell], reference: str) -> list[tuple[str, str]]:
    pairs = [(norm, norm) for norm in here if norm in base and norm != reference]
    alone = [norm for norm in here if norm not in base], [norm for norm in base if norm not in here]
    return pairs + ([(alone[0][0], alone[1][0])] if len(alone[0]) == len(alone[1]) == 1 else [])


def _others(factors: Iterable[Factor], factor: Factor) -> list[Factor]:
    return [other for other in factors if other is not factor]


def _levels(cell: Cell, factors: Iterable[Factor]) -> tuple[str, ...]:
    return tuple(factor.level(cell) for factor in factors)


def _told_apart(
    context: tuple[str, ...], among: Iterable[tuple[str, ...]], factors: Sequence[Factor], always: int = -1
) -> str:
    """Return what tells a context, which ends in the levels of ``factors``, from the others; and part ``always``."""
    names = [*[""] * (len(context) - len(factors)), *(f"{factor.name} " for factor in factors)]
    varies = [len(set(parts)) > 1 for parts in zip(*among, strict=True)]
    return ", ".join(f"{names[i]}{part}" for i, part in enumerate(context) if varies[i] or i == always)


def _average(contexts: int, columns: int, *last: str) -> tuple[str, ...]:
    """Return the labels of an average, in a table with so many columns before ``last``."""
    return (f"mean of {contexts}", *[""] * (columns - 1), *last)

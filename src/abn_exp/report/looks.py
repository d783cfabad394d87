"""What a study fixed before its runs: its primary comparison, delta and, where seeds are added, the looks at them.

Every run's `config.yaml` holds `primary` and `delta`. A study whose seeds are added until it is decided has, besides,
a `plan.json` beside its report, written before its first run, which gets an entry a look. Where reports were written
at several numbers of seeds without a plan, `looks.json` has these numbers.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from abn_exp.config import PrimaryConfig
from abn_exp.errors import DamagedFile
from abn_exp.files import write_text_atomic
from abn_exp.records import LOOKS, RECORDS, read_looks, read_study_file
from abn_exp.report.comparisons import (
    Cell,
    Comparison,
    Group,
    Key,
    compare,
    compare_spread,
    one_kind_each,
    pairs_of,
    pooled_difference,
    started_seeds,
)
from abn_exp.report.formatting import interval_text, signed_text
from abn_exp.report.sequential import Spending, nominal_levels
from abn_exp.report.spread import SpreadJudgement, judge_spreads
from abn_exp.report.stats import ALPHA
from abn_exp.report.verdicts import Judgement, judge

PLAN = "plan.json"
DELTA = 0.5  # points, where none was fixed before the runs


@dataclass(frozen=True)
class Fixed:
    """What the runs' configurations say was fixed before them."""

    delta: float
    question: PrimaryConfig | None
    note: str  # in words, what was fixed and what was not


def fixed_before(configs: Sequence[Mapping[str, Any]]) -> Fixed:
    """Return what all runs agree on; ``configs`` is one configuration a run."""
    deltas = {config.get("delta") for config in configs} or {None}  # no run whose configuration can be read
    questions = {json.dumps(config.get("primary"), sort_keys=True) for config in configs}
    applied = f"delta = {DELTA:g} points was applied afterwards"
    if None in deltas:
        which = "these runs" if deltas == {None} else "some of these runs"
        return Fixed(DELTA, None, f"Neither a primary comparison nor delta was fixed before {which}; {applied}.")
    if len(deltas) > 1:
        return Fixed(DELTA, None, f"The runs were started with different values of delta; {applied}.")
    (delta,) = deltas
    assert delta is not None
    if len(questions) > 1:
        return Fixed(delta, None, "The runs were started with different primary comparisons, so there is none.")
    primary = json.loads(questions.pop())
    if primary is None:
        return Fixed(delta, None, f"No primary comparison was fixed before these runs; delta = {delta:g} points was.")
    note = f"The primary comparison and delta = {delta:g} points were fixed before the runs."
    return Fixed(delta, PrimaryConfig.model_validate(primary), note)


@dataclass(frozen=True)
class Plan:
    """`plan.json`: one primary comparison with one number, and the looks at it."""

    norm: str
    reference: str
    groups: tuple[Group, ...]  # (dataset, model, variant); several are pooled
    delta: float
    looks: tuple[int, ...]  # numbers of seeds
    seeds: tuple[int, ...]  # in the order in which they are added
    spending: Spending
    alpha: float = ALPHA
    commit: str | None = None
    written: str = ""  # when
    entries: list[dict[str, Any]] = field(default_factory=list)  # one a look

    def levels(self, look: int) -> tuple[float, float]:
        """Return the level of the two-sided test of no difference and of each test against delta at a look."""
        two_sided = 2 * nominal_levels(self.looks, self.alpha / 2, self.spending)[look]
        return two_sided, nominal_levels(self.looks, self.alpha, self.spending)[look]

    def seeds_at(self, look: int) -> tuple[int, ...]:
        return self.seeds[: self.looks[look]]

    def pairs(self, cells: Iterable[Cell]) -> list[tuple[Cell, Cell]]:
        return [(a, b) for a, b in pairs_of(cells, self.norm, self.reference) if _planned_group(a) in self.groups]

    def judge(self, cells: Iterable[Cell], look: int) -> Judgement:
        """Judge the primary comparison by the seeds of a look. Raises ValueError where a cell is missing, or where
        one was run on several kinds of device."""
        cells = list(cells)
        pairs, norms = self.pairs(cells), (self.norm, self.reference)
        if {_planned_group(cell) for cell, _ in pairs} != set(self.groups):
            raise ValueError(f"The runs of the comparison in {PLAN} are not all there.")
        if len({c.device for c in cells if _planned_group(c) in self.groups and c.norm in norms and c.ended}) > 1:
            raise ValueError(f"The comparison in {PLAN} was run on several kinds of device, which are not averaged.")
        (found,) = judge([pooled_difference(pairs, self.seeds_at(look))], self.delta, *self.levels(look))
        return found

    @property
    def decided(self) -> bool:
        """Is there nothing more to run: a verdict, or no look left?"""
        return bool(self.entries) and (
            self.entries[-1]["verdict"] != "undecided" or len(self.entries) == len(self.looks)
        )

    def contradictions(self, other: "Plan") -> list[str]:
        """Say what another plan for the same folder would change."""
        names = ("norm", "reference", "groups", "delta", "alpha", "looks", "seeds", "spending")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} {_words(ours)}, not {_words(theirs)}" for name, ours, theirs in pairs if ours != theirs]


def _planned_group(cell: Cell) -> Group:
    """Return a cell's group as a plan names it: by the variant of its folders, not by what a report adds to that."""
    return cell.dataset, cell.model, cell.runs[0].directory.parts[-2]


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join("/".join(part) if isinstance(part, tuple) else str(part) for part in value)
    return str(value)


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of a study; None where it has none. Raises DamagedFile where it cannot be read."""
    if (content := read_study_file(folder, PLAN)) is None:
        return None
    try:
        found = json.loads(content)
        found |= {key: tuple(found[key]) for key in ("looks", "seeds")}
        found["groups"] = tuple(tuple(group) for group in found["groups"])
        plan = Plan(**found)
        nominal_levels(plan.looks, plan.alpha, plan.spending)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFile(folder / PLAN, error) from error
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / PLAN, json.dumps(asdict(plan), indent=2) + "\n")


def look(folder: Path, plan: Plan, cells: Iterable[Cell], when: str) -> Judgement:
    """Judge by the seeds of the next look, add that to the plan and write it into `plan.json`."""
    number = len(plan.entries)
    found = plan.judge(cells, number)
    entry = {
        "look": number + 1,
        "date": when,
        "seeds": plan.looks[number],
        "pairs": found.mean.n[0],
        "failed": list(found.failed),
        "difference": _number(found.mean.difference),
        "interval": [_number(end) for end in found.interval],
        "p_difference": _number(found.uncorrected.difference),
        "p_not_better": _number(found.uncorrected.not_better),
        "p_not_worse": _number(found.uncorrected.not_worse),
        "boundary_difference": found.level,
        "boundary_delta": found.level_delta,
        "verdict": found.verdict,
    }
    plan.entries.append(entry)
    write_plan(folder, plan)
    return found


def look_text(entry: Mapping[str, Any]) -> str:
    """Return what a look found, as it was recorded."""
    text = f"Look {entry['look']}, at {entry['seeds']} seeds: "
    if entry["difference"] is not None:
        low, high = (math.nan if end is None else end for end in entry["interval"])
        text += f"{signed_text(entry['difference'])} points (sequential 95 % interval {interval_text((low, high))}), "
    return f"{text}{entry['verdict']}."


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def record_look(folder: Path, comparisons: Sequence[Comparison]) -> list[int]:
    """Add the number of seeds that this report compares to those of earlier reports, and return the earlier ones.

    It is the number of seeds that came to an end, with a score or with a failure: of both norms where they are
    compared in pairs, else of the norm with fewer. A quoted study's records do not change, so that nothing is added.

    Raises DamagedFile where what earlier reports left cannot be read.
    """
    now = {}
    for c in comparisons:
        own, base = c.cell.ended, c.base.ended
        pairs, fewer = len(own & base), min(len(own), len(base))
        now["/".join(c.cell.key)] = pairs if pairs >= 2 and 2 * pairs >= fewer else fewer  # as in `compare_means`
    earlier = read_looks(folder / LOOKS, read_study_file(folder, LOOKS))
    seen = sorted({n for key, count in now.items() for n in earlier.get(key, []) if n < count})
    updated = {key: sorted({*earlier.get(key, []), n}) for key, n in now.items() if n}
    if earlier | updated != earlier and not (folder / RECORDS).is_file():
        with suppress(OSError):  # a read-only folder, whose report is written elsewhere
            write_text_atomic(folder / LOOKS, json.dumps(earlier | updated, indent=1) + "\n")
    return seen


@dataclass(frozen=True)
class Primary:
    """The primary comparison as far as it may be judged. Keys are those of the candidate's cells."""

    question: PrimaryConfig
    pairs: list[tuple[Cell, Cell]]
    means: dict[Key, Judgement] = field(default_factory=dict)  # statistic mean: one family
    pooled: Judgement | None = None  # statistic pooled, and a plan's
    spreads: dict[Key, SpreadJudgement] = field(default_factory=dict)  # statistic spread
    withheld: str = ""  # why it is not judged yet
    look: str = ""  # which of a plan's looks this is


def judge_primary(
    cells: Sequence[Cell], question: PrimaryConfig, delta: float, interim: bool, unbegun: Sequence[Cell] = ()
) -> Primary:
    """Judge a primary comparison whose number of seeds is fixed; not while its runs are still under way, those of
    cells of which none has begun (`unbegun`) among them."""

    def asked(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
        return [
            (cell, base)
            for cell, base in pairs_of(cells, question.norm, question.reference)
            if (question.datasets is None or cell.dataset in question.datasets)
            and (question.models is None or cell.model in question.models)
        ]

    pairs = asked(cells)
    if not pairs:
        return Primary(question, pairs, withheld="It has no runs in this folder.")
    if interim:
        return Primary(question, pairs, withheld="It is judged when all runs of the sweep have come to their end.")
    all_cells = {cell.key: cell for pair in asked([*cells, *unbegun]) for cell in pair}
    states = [run.status for cell in all_cells.values() for run in cell.runs]
    if left := sum(status in ("unfinished", "damaged") for status in states):  # the command restores what is damaged
        have = "one of its runs has" if left == 1 else f"{left} of its runs have"
        also = ", or cannot be read" if "damaged" in states else ""
        then = "Give the command again, or remove the folders of runs that are not to be trained."
        return Primary(question, pairs, withheld=f"It is not judged yet: {have} not come to an end{also}. {then}")
    if question.statistic == "spread":
        spreads = judge_spreads([compare_spread(*pair) for pair in pairs])
        return Primary(question, pairs, spreads={a.key: s for (a, _), s in zip(pairs, spreads, strict=True)})
    groups, norms = {_planned_group(cell) for cell, _ in pairs}, (question.norm, question.reference)
    of_question = [c for c in cells if _planned_group(c) in groups and c.norm in norms and c.ended]
    if question.statistic == "pooled" and not one_kind_each(of_question):
        why = "It was run on several kinds of device, which are not averaged: there are the cells' own comparisons."
        return Primary(question, [], withheld=why)  # no pairs: nothing waits for it
    if question.statistic == "pooled":
        return Primary(question, pairs, pooled=judge([pooled_difference(pairs)], delta)[0])
    family = [compare([a], [b], started_seeds([a, b])) for a, b in pairs]
    return Primary(question, pairs, {a.key: j for (a, _), j in zip(pairs, judge(family, delta), strict=True)})


def judge_planned(cells: Sequence[Cell], plan: Plan) -> Primary:
    """Judge the primary comparison of a plan by its latest look; between looks it is withheld."""
    statistic: Literal["pooled", "mean"] = "pooled" if len(plan.groups) > 1 else "mean"
    question = PrimaryConfig(norm=plan.norm, reference=plan.reference, statistic=statistic)
    pairs, done = plan.pairs(cells), len(plan.entries)
    under_way = {seed for cell in (c for pair in pairs for c in pair) for seed in cell.scores["test_acc"]}
    if not done or (not plan.decided and under_way - set(plan.seeds_at(done - 1))):
        next_look = f"It is judged at {plan.looks[done]} seeds, look {done + 1} of {len(plan.looks)}."
        return Primary(question, pairs, withheld=" ".join([next_look, *map(look_text, plan.entries[-1:])]))
    look = f"look {done} of {len(plan.looks)}, at {plan.looks[done - 1]} seeds"
    if outside := sorted(under_way - set(plan.seeds_at(done - 1))):
        look += f"; seeds that no look asked for are left out: {', '.join(map(str, outside))}"
    try:
        found = plan.judge(cells, done - 1)
    except ValueError as error:
        return Primary(question, pairs, withheld=f"{error}")
    if found.verdict != plan.entries[-1]["verdict"]:
        look += f"; at the look itself, with the runs of then, it was {plan.entries[-1]['verdict']}"
    return Primary(question, pairs, pooled=found, look=look)

"""Factors of a study besides data set, network and norm: options that differ between its cells, and their names."""

import json
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abn_exp.report.comparisons import Cell, Key

ABSENT = "absent"
# By factor, where they are levels, whatever most cells have.
REFERENCES = {"recipe": "fixed", "precision": "fp32", "device": "cpu"}

MOST_NAMED = 3  # factors that a title names in any case


@dataclass(frozen=True)
class Factor:
    """Something that varies: one key of the configuration, several that vary together, or the whole recipe.

    The first of ``levels`` is the reference.
    """

    name: str
    levels: tuple[str, ...]
    by_cell: Mapping[Key, str]

    @property
    def reference(self) -> str:
        return self.levels[0]

    def level(self, cell: Cell) -> str:
        return self.by_cell[cell.key]


def describe_group(cells: Sequence[Cell], factors: Sequence[Factor]) -> str:
    """Return what a comparison of norms holds fixed, in words; of an option of the norms' own, all levels there.

    Of more than three factors, only those that are not at their reference level are named.
    """
    levels = []
    for factor in factors:
        found = dict.fromkeys(level for cell in cells if not _absent(level := factor.level(cell))) or {ABSENT: None}
        if len(factors) <= MOST_NAMED or list(found) != [factor.reference]:
            levels.append(f"{factor.name} {' or '.join(found)}".removeprefix("variant "))
    if factors and not levels:
        levels.append("every factor at its reference")
    return f"{cells[0].dataset} with {cells[0].model}" + (f" ({', '.join(levels)})" if levels else "")


def _absent(level: str) -> bool:
    return set(level.split(", ")) == {ABSENT}


def find_factors(settings: Mapping[Key, Mapping[str, Any]], devices: Mapping[Key, str] | None = None) -> list[Factor]:
    """Return what varies between cells of the same data set and network: options of the norms, of the same norm.

    ``settings`` gives the flat configuration of each cell, by the cell's key, and under "recipe" the recipe's name.
    ``devices`` gives the kind of device of each cell where there are several; it is a factor of its own.
    A key whose value follows from the recipe is the recipe's; keys that follow from each other are one factor. The
    reference level is the one of REFERENCES, else the one most cells have, else the one with the shortest variant
    name, the fewest overrides.
    Where this does not tell all cells apart, or gives one description to groups of different norms, the variant's
    name itself is the factor.
    """
    columns = varying_options(settings)
    groups: list[list[str]] = []
    for key, column in columns.items():
        for group in groups:
            lead = columns[group[0]]
            alike = _alike(settings, key, group[0])
            if _follows(column, lead, alike) and (group[0] == "recipe" or _follows(lead, column, alike)):
                group.append(key)
                break
        else:
            groups.append([key])
    factors = [_factor(group, columns) for group in groups]
    factors += [_factor(["device"], {"device": devices})] if devices else []
    levels = {cell: tuple(factor.by_cell[cell] for factor in factors) for cell in settings}
    described = {(*cell[:2], *levels[cell]) for cell in settings}
    of_groups = {(*cell[:2], *levels[cell], cell[3]) for cell in settings}
    apart = len({(*cell[:3], *levels[cell]) for cell in settings}) == len(settings)
    if not apart or len(described) < len(of_groups):
        return [_factor(["variant"], {"variant": {cell: cell[3] for cell in settings}})]
    return factors


def varying_options(settings: Mapping[Key, Mapping[str, Any]]) -> dict[str, dict[Key, str]]:
    """Return the values, by cell, of each option that varies between cells of the same data set and network; of a
    norm's own options, between cells of the same norm."""
    columns = {}
    for key in sorted({key for one in settings.values() for key in one}, key=lambda key: (key != "recipe", key)):
        column = {cell: _text(one.get(key, ABSENT)) for cell, one in settings.items()}
        if any(len({column[cell] for cell in cells}) > 1 for cells in _alike(settings, key)):
            columns[key] = column
    return columns


def _alike(settings: Iterable[Key], *options: str) -> Collection[list[Key]]:
    """Return the cells within which these options are compared: of one data set, one network and, for a norm's own
    options, one norm."""
    parts = 3 if any(option.startswith("norm.") for option in options) else 2
    alike: dict[tuple[str, ...], list[Key]] = {}
    for cell in settings:
        alike.setdefault(cell[:parts], []).append(cell)
    return alike.values()


def _follows(column: Mapping[Key, str], lead: Mapping[Key, str], alike: Iterable[list[Key]]) -> bool:
    """Tell whether, within cells that are compared, the one value decides the other."""
    return all(len({lead[c] for c in cells}) == len({(lead[c], column[c]) for c in cells}) for cells in alike)


def _factor(group: Sequence[str], columns: Mapping[str, Mapping[Key, str]]) -> Factor:
    keys = group[:1] if group[0] == "recipe" else group
    by_cell = {cell: ", ".join(columns[key][cell] for key in keys) for cell in columns[keys[0]]}
    counts: Counter[Hashable] = Counter(by_cell.values())
    shortest = {level: min(len(c[3]) for c, own in by_cell.items() if own == level) for level in by_cell.values()}
    levels = sorted(shortest, key=lambda level: [_numeric(part) for part in level.split(", ")])
    name = ", ".join(key.removeprefix("recipe.") for key in keys)
    reference = min(levels, key=lambda v: (_absent(v), v != REFERENCES.get(name), -counts[v], shortest[v]))
    return Factor(name, (reference, *(level for level in levels if level != reference)), by_cell)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _numeric(level: str) -> tuple[float, str]:
    """Sort numbers by size, before everything else."""
    try:
        return float(level), level
    except ValueError:
        return float("inf"), level

"""Numbers, tables and lists as text: one form for the report of a study, of an analysis and of a benchmark."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

Table = tuple[list[str], list[list[str]]]  # header, rows


def number_text(value: float, digits: int = 2, sign: str = "") -> str:
    """Return a number with ``digits`` decimals; "-" where there is none, and zero never has a sign.

    Of what three decimals or more would show as zero, the magnitude is returned: 6e-07.
    """
    if math.isnan(value):
        return "-"
    if digits >= 3 and 0 < abs(value) < 0.5 * 10**-digits:
        return f"{value:{sign}.0e}"
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"


def signed_text(value: float, digits: int = 2) -> str:
    """Return a difference with its sign; one that rounds to zero has a plus."""
    return number_text(value, digits, "+")


def interval_text(interval: tuple[float, float], digits: int = 2) -> str:
    if math.isnan(interval[0]):
        return "-"
    return f"{number_text(interval[0], digits)} to {number_text(interval[1], digits)}"


def p_text(p: float) -> str:
    """Return a p value; one that would round to 5 % has more digits, which show on which side of it it is."""
    digits = 4 if p < 0.1 else 3
    return "< 0.001" if p < 0.001 else number_text(p, 7 if round(p, digits) == 0.05 != p else digits)


def p_equation(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"


def percent_text(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def significant_text(value: float) -> str:
    """Return a quantity with three significant digits, from a thousand on without decimals."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def markdown_table(table: Table, numbers_from: int | None = None) -> str:
    """Return a table as Markdown; from the column ``numbers_from`` on it is aligned to the right."""
    header, rows = table
    left = len(header) if numbers_from is None else numbers_from
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a Markdown document: its title and its parts, without the empty ones."""
    return "\n\n".join([f"# {title}", *filter(None, parts)]) + "\n"


def replace_between(text: str, begin: str, end: str, block: str) -> str:
    """Return a document with what stands between two marks replaced. Raises ValueError where it lacks the marks."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The document should hold the lines {begin} and {end} once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as CSV, floats with eight digits; what there is not, is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return "" if value is None else value

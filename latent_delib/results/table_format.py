"""A table of figures, and its two forms: Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

CHANGE, SCORE, SCORE_CHANGE = "{:+.2f}%", "{:.2f}", "{:+.2f}"


class Figure(NamedTuple):
    """Holds a figure.

    form: the format of the value.
    low, high: the ends of the 95 % interval, where known.
    key: the key of the figure's file, where a row has figures of several files.
    """

    value: float
    form: str = SCORE
    low: float | None = None
    high: float | None = None
    key: str = ""

    def __str__(self) -> str:
        text = self.form.format(self.value)
        if self.has_interval:
            plain = self.form.rstrip("%")
            text += f" [{plain.format(self.low)}, {plain.format(self.high)}]"
        return f"{text} {self.key}".rstrip()

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


Cell = str | int | Figure
Row = dict[str, Cell]  # by column


class Table(NamedTuple):
    """Holds a table of the report.

    name: the name of its files, without suffix.
    rows: one cell per column.
    note: a line below the table.
    origins: lines that say where the figures are from, one per file.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str
    origins: list[str]


def change(row: dict[str, Any]) -> Figure:
    """Returns the change of a row of perplexity.json."""
    return Figure(row["change_percent"], CHANGE, row.get("change_low"), row.get("change_high"))


def score(row: dict[str, Any], key: str = "") -> Figure:
    """Returns the score of a row of benchmarks.json."""
    return Figure(row["value"], SCORE, row.get("low"), row.get("high"), key)


def score_change(row: dict[str, Any]) -> Figure:
    """Returns how much a row of benchmarks.json differs from the decoder's row."""
    return Figure(row["change"], SCORE_CHANGE, row.get("change_low"), row.get("change_high"))


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", _line(table.columns), _line(["---"] * len(table.columns))]
    lines += map(_line, table.rows)
    if table.note:
        lines += ["", table.note]
    if table.origins:
        lines += ["", *(f"- {origin}" for origin in table.origins)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[Cell]) -> str:
    """Writes a line of a Markdown table; a | inside a cell is escaped."""
    words = [" ".join(str(cell).replace("|", "\\|").split()) for cell in cells]
    return f"| {' | '.join(words)} |"


def as_csv(table: Table) -> str:
    """Returns a table as CSV, its numbers not rounded.

    A column with intervals becomes three: X, "X low" and "X high".
    """
    with_intervals = [_has_interval(column) for column in zip(*table.rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = []
    for name, is_wide in zip(table.columns, with_intervals):
        names += [name, f"{name} low", f"{name} high"] if is_wide else [name]
    writer.writerow(names)
    for row in table.rows:
        cells: list[Any] = []
        for cell, is_wide in zip(row, with_intervals):
            numbers = [cell, "", ""]
            if isinstance(cell, Figure):
                numbers = [cell.value, cell.low, cell.high]
            cells += numbers if is_wide else numbers[:1]
        writer.writerow(cells)
    return text.getvalue()


def _has_interval(column: Sequence[Cell]) -> bool:
    return any(isinstance(cell, Figure) and cell.has_interval for cell in column)

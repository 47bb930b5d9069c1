"""Writes tables, in plain text or in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """Returns the lines of a table, each column as wide as its longest cell.

    Args:
      lines: the cells of each line; the first line has the names of the columns.
      left: names of the columns that are aligned left. All others are aligned right.
    """
    names = lines[0]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = []
    for line in lines:
        cells = []
        for name, cell, width in zip(names, line, widths, strict=True):
            cells.append(cell.ljust(width) if name in left else cell.rjust(width))
        written.append("  ".join(cells).rstrip())
    return written


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown.

    Args:
      head: names of the columns.
      rows: a cell for each column, without bars.
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)

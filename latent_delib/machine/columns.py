"""Aligns tables in plain text."""

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """Returns the lines of a table, each column as wide as its longest cell.

    Args:
      lines: the cells of each line; those of the first are the names of the columns.
      left: names of columns whose cells stand to the left. All others stand to the right.
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

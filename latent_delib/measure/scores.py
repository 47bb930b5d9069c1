"""Figures of a benchmark over its documents: value, standard error, 95 % interval."""

import math
from collections.abc import Sequence
from typing import Any

from latent_delib.errors import UserError
from latent_delib.machine.columns import aligned

Row = dict[str, Any]

Z = 1.96  # standard errors, for 95 %
COLUMNS = ("benchmark", "model", "shots", "every", "delay", "documents", "value", "95 % interval", "unit")
TEXT = ("benchmark", "model", "unit")  # columns; the rest are numbers


def figures(samples: Sequence[Row], metric: str, name: str = "") -> Row:
    """Returns a row's figures over documents: value, standard error, 95 % interval, unit, number of documents.

    Scores from 0 to 1 become percent. bits_per_byte is Σ -log2 p / Σ bytes.

    Args:
      samples: the harness's result for each document.
      metric: the key of a sample that counts.
      name: of the benchmark, for the message.

    Raises:
      UserError: the documents have no such metric.
    """
    values = [sample[metric] for sample in samples if metric in sample]
    if not values:
        has = sorted({m for sample in samples for m in sample["metrics"]})
        raise UserError(f"{name}: no document has metric {metric!r} under its filter; there are {has}")
    if metric == "bits_per_byte":
        unit = metric
        value, stderr, low, high = _ratio(values)
    else:
        unit = "percent"
        value, stderr, low, high = _percent(list(map(float, values)))
    return {
        "metric": metric,
        "unit": unit,
        "value": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "documents": len(values),
    }


def _ratio(values: Sequence[tuple[float, int]]) -> tuple[float, float | None, float | None, float | None]:
    """Returns Σ bits / Σ bytes of (log p, bytes), its standard error as of a ratio, and the interval's ends."""
    n = len(values)
    bits = [-logp / math.log(2) for logp, _ in values]
    size = sum(size for _, size in values)
    value = sum(bits) / size
    if n == 1:
        return value, None, None, None
    residual = sum((b - value * s) ** 2 for b, (_, s) in zip(bits, values))
    stderr = math.sqrt(residual * n / (n - 1)) / size
    return value, stderr, value - Z * stderr, value + Z * stderr


def _percent(scores: Sequence[float]) -> tuple[float, float | None, float, float]:
    """Returns the mean of scores from 0 to 1 in percent, its standard error, and the ends of Wilson's interval."""
    n = len(scores)
    p = sum(scores) / n
    variance = sum((score - p) ** 2 for score in scores) / n  # p (1 - p) where every score is 0 or 1
    stderr = 100 * math.sqrt(variance / (n - 1)) if n > 1 else None
    middle = p + Z**2 / (2 * n)
    half = Z * math.sqrt(variance / n + Z**2 / (4 * n**2))
    low = 100 * (middle - half) / (1 + Z**2 / n)
    high = 100 * (middle + half) / (1 + Z**2 / n)
    return 100 * p, stderr, max(0.0, low), min(100.0, high)


def show(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in plain text."""
    lines: list[Sequence[str]] = [COLUMNS]
    for row in rows:
        interval = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        shown = row | {"value": f"{row['value']:.2f}", "95 % interval": interval, "documents": f"{row['documents']:,}"}
        lines.append([str(shown[column]) for column in COLUMNS])
    return "\n".join(aligned(lines, left=TEXT))

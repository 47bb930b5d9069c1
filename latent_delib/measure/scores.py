"""Figures of a benchmark over its documents: value, standard error, 95 % interval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine.columns import aligned

Row = dict[str, Any]
# A value, its standard error, the ends of its 95 % interval.
Figure = tuple[float, float | None, float | None, float | None]

Z = 1.96  # standard errors, for 95 %
COLUMNS = (
    "benchmark",
    "model",
    "shots",
    "every",
    "delay",
    "documents",
    "value",
    "95 % interval",
    "unit",
)
TEXT = ("benchmark", "model", "unit")  # columns; the rest are numbers


def summarize_scores(samples: Sequence[Row], metric: str, name: str = "") -> Row:
    """Returns the figures of a row: a metric's value over documents, and its uncertainty.

    They are metric, unit, value, stderr, low and high (the ends of the 95 % interval), and
    documents (how many). Scores from 0 to 1 become percent. bits_per_byte is Σ -log2 p / Σ bytes.

    Args:
      samples: the harness's result for each document.
      metric: the key of the score in a sample.
      name: the benchmark's name, for the message.

    Raises:
      UserError: the documents have no such metric.
    """
    values = [sample[metric] for sample in samples if metric in sample]
    if not values:
        has: set[str] = set()
        for sample in samples:
            has.update(sample["metrics"])
        raise UserError(
            f"{name}: no document has metric {metric!r} under its filter; there are {sorted(has)}"
        )
    if metric == "bits_per_byte":
        unit = metric
        value, stderr, low, high = _ratio(np.array(values, np.float64))
    else:
        unit = "percent"
        value, stderr, low, high = percent(np.array(values, np.float64))
    return {
        "metric": metric,
        "unit": unit,
        "value": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "documents": len(values),
    }


def _ratio(values: np.ndarray) -> Figure:
    """Returns Σ bits / Σ bytes, the standard error of this ratio, and the interval's ends.

    values: log p and bytes of each document, float64 [documents, 2].
    """
    n = len(values)
    bits = -values[:, 0] / math.log(2)
    size = values[:, 1]
    value = float(bits.sum() / size.sum())
    if n == 1:
        return value, None, None, None
    residual = float(np.square(bits - value * size).sum())
    stderr = math.sqrt(residual * n / (n - 1)) / float(size.sum())
    return value, stderr, value - Z * stderr, value + Z * stderr


def mean(values: np.ndarray) -> Figure:
    """Returns the mean of values, float64 [documents], its standard error, the interval's ends."""
    n = len(values)
    value = float(values.mean())
    if n == 1:
        return value, None, None, None
    stderr = float(values.std(ddof=1)) / math.sqrt(n)
    return value, stderr, value - Z * stderr, value + Z * stderr


def percent(scores: np.ndarray) -> Figure:
    """Returns the mean of 0-to-1 scores in percent, its standard error, Wilson's interval.

    scores: float64 [documents].
    """
    n = len(scores)
    p = float(scores.mean())
    variance = float(scores.var())  # p (1 - p) where every score is 0 or 1
    stderr = 100 * math.sqrt(variance / (n - 1)) if n > 1 else None
    middle = p + Z**2 / (2 * n)
    half = Z * math.sqrt(variance / n + Z**2 / (4 * n**2))
    low = 100 * (middle - half) / (1 + Z**2 / n)
    high = 100 * (middle + half) / (1 + Z**2 / n)
    return 100 * p, stderr, max(0.0, low), min(100.0, high)


def format_rows(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in plain text."""
    lines: list[Sequence[str]] = [COLUMNS]
    for row in rows:
        interval = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        shown = row | {
            "value": f"{row['value']:.2f}",
            "95 % interval": interval,
            "documents": f"{row['documents']:,}",
        }
        lines.append([str(shown[column]) for column in COLUMNS])
    return "\n".join(aligned(lines, left=TEXT))

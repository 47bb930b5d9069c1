"""Figures of a benchmark over its documents: value, standard error, 95 % interval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from latent_delib.errors import UserError
from latent_delib.machine.columns import aligned

BenchmarkRow = dict[str, Any]
# A value, its standard error, the ends of its 95 % interval.
Estimate = tuple[float, float | None, float | None, float | None]

ANSWER = "answer_logp"  # the key of log p of the right answer, nats, in samples and rows
CHANGE = "change"  # the key of a row's difference from the decoder's row, in the row's unit
CHANGE_FIELDS = (CHANGE, f"{CHANGE}_low", f"{CHANGE}_high")
Z = 1.96  # standard errors, for 95 % in Wilson's interval
COLUMNS: tuple[str, ...] = (
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
CHANGE_COLUMN = "change against decoder"  # shown where a row has it
ANSWER_COLUMNS = ("log p of answer", "95 % interval, nats")  # shown where a row has them
TEXT = ("benchmark", "model", "unit")  # columns; the rest are numbers


def summarize_scores(samples: Sequence[BenchmarkRow], metric: str, name: str = "") -> BenchmarkRow:
    """Returns the figures of a row: a metric's value over documents, and its uncertainty.

    They are metric, unit, value, stderr, low and high (the ends of the 95 % interval), and
    documents (how many). Scores from 0 to 1 become percent. bits_per_byte is Σ -log2 p / Σ bytes.
    If the samples have ANSWER, its mean and the ends of its interval follow, as `named` names them.

    Args:
      samples: the harness's result for each document.
      metric: the key of the score in a sample.
      name: the benchmark's name, for the message.

    Raises:
      UserError: the documents have no such metric, or it is no score from 0 to 1 for each.
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
        logp, num_bytes = np.array(values, np.float64).T
        value, stderr, low, high = _ratio(-logp / math.log(2), num_bytes)
    else:
        unit = "percent"
        scores = np.array(values, np.float64)
        if scores.ndim != 1 or scores.min() < 0 or scores.max() > 1:
            raise UserError(
                f"{name}: metric {metric!r} is {values[0]!r} for the first document, expected a "
                "score from 0 to 1, or metric bits_per_byte"
            )
        value, stderr, low, high = percent(scores)
    row = {
        "metric": metric,
        "unit": unit,
        "value": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "documents": len(values),
    }
    answers = [sample[ANSWER] for sample in samples if ANSWER in sample]
    if answers:
        row |= named(ANSWER, mean(np.array(answers, np.float64)))
    return row


def compare_scores(
    samples: Sequence[BenchmarkRow], base: Sequence[BenchmarkRow], metric: str
) -> BenchmarkRow:
    """Returns how much a model's score differs from another's on the same documents.

    The documents are compared one by one, so the interval is narrower than those of the two scores
    suggest. The fields are CHANGE, in percentage points or in bits per byte, and the ends of its
    95 % interval, as `named` names them.

    Args:
      samples: the harness's result for each document, of the model.
      base: the same, of the model that it is compared with; in any order.
      metric: the key of the score in a sample.
    """
    others = {(sample["task"], sample["doc_id"]): sample[metric] for sample in base}
    ours = np.array([sample[metric] for sample in samples], np.float64)
    theirs = np.array([others[sample["task"], sample["doc_id"]] for sample in samples], np.float64)
    if metric != "bits_per_byte":
        return named(CHANGE, _paired(ours - theirs))
    logp, num_bytes = (ours - theirs).T[0], ours.T[1]
    return named(CHANGE, _ratio(-logp / math.log(2), num_bytes))


def _paired(difference: np.ndarray) -> Estimate:
    """Returns the mean difference between two 0-to-1 scores of the same documents, in percent.

    The interval is that of Agresti and Min, Statistics in Medicine 24 (2005): the usual one, after
    two documents are added, of which half a one differs in each direction. It holds for few
    differences too.

    difference: float64 [documents], -1 to 1.
    """
    n = len(difference) + 2
    middle = difference.sum() / n
    variance = (np.square(difference).sum() + 1) / n - middle**2
    stderr = math.sqrt(variance / n)
    value = 100 * float(difference.mean())
    return value, 100 * stderr, 100 * (middle - Z * stderr), 100 * (middle + Z * stderr)


def _ratio(values: np.ndarray, size: np.ndarray) -> Estimate:
    """Returns Σ values / Σ size, the standard error of this ratio, and the interval's ends.

    values, size: float64 [documents].
    """
    n = len(values)
    value = float(values.sum() / size.sum())
    if n == 1:
        return value, None, None, None
    residual = float(np.square(values - value * size).sum())
    stderr = math.sqrt(residual * n / (n - 1)) / float(size.sum())
    half = float(special.stdtrit(n - 1, 0.975)) * stderr  # Student's: a few documents
    return value, stderr, value - half, value + half


def mean(values: np.ndarray) -> Estimate:
    """Returns the mean of values, float64 [documents], its standard error, the interval's ends."""
    return _ratio(values, np.ones(len(values)))


def percent(scores: np.ndarray) -> Estimate:
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


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """Returns an estimate by name, with the ends of its interval where it has one."""
    value, _, low, high = estimate
    if low is None or high is None:
        return {name: value}
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def format_rows(rows: Sequence[BenchmarkRow]) -> str:
    """Returns the rows as a table in plain text; rows of older files lack some columns."""
    columns = COLUMNS
    if any(CHANGE in row for row in rows):
        columns += (CHANGE_COLUMN,)
    if any(ANSWER in row for row in rows):
        columns += ANSWER_COLUMNS
    lines: list[Sequence[str]] = [columns]
    for row in rows:
        low, high = row.get(f"{ANSWER}_low"), row.get(f"{ANSWER}_high")
        shown = row | {
            "value": f"{row['value']:.2f}",
            "95 % interval": _interval(row["low"], row["high"], 2),
            "documents": f"{row['documents']:,}",
            CHANGE_COLUMN: _signed(row),
            "log p of answer": f"{row[ANSWER]:.3f}" if ANSWER in row else "",
            "95 % interval, nats": _interval(low, high, 3),
        }
        lines.append([str(shown[column]) for column in columns])
    return "\n".join(aligned(lines, left=TEXT))


def _signed(row: BenchmarkRow) -> str:
    """Returns a row's difference from the decoder, with its interval; "" where it has none."""
    value, low, high = (row.get(key) for key in CHANGE_FIELDS)
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{value:+.2f}{interval}"


def _interval(low: float | None, high: float | None, digits: int) -> str:
    """Returns the ends of an interval in words; "" without an interval."""
    return "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"

"""Perplexity of the n-th token ahead (Section 3.1, Table 1): sums of each document, and tables.

Documents are pooled, and intervals estimated, only after all sums are known.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from latent_delib.errors import store_errors
from latent_delib.job.experiment import Experiment
from latent_delib.machine import distributed, files
from latent_delib.machine.distributed import warn
from latent_delib.measure import intervals, metric
from latent_delib.measure.text import ValidationText
from latent_delib.measure.values import Values
from latent_delib.measure.views import Case, View

FEW_WORKS = 20  # a source of at most this many works has a table for each work


class Sums(NamedTuple):
    """Holds the sums of one term over each document's tokens, [documents, A] for n = 1 ... A.

    tokens: int64, how many count.
    decoder: float64, the sum under the frozen decoder. The term "nll" is -log p, in nats.
    augmented: float64, the same under the evaluated model, with latents.
    """

    tokens: np.ndarray
    decoder: np.ndarray
    augmented: np.ndarray


SumsByTerm = dict[str, Sums]


def zeros(exp: Experiment, text: ValidationText) -> SumsByTerm:
    """Returns the initial sums by term, all zero."""
    shape = (len(text.source), exp.config.evaluate.num_ahead)
    sums = {}
    for term in metric.all_terms():
        sums[term] = Sums(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))
    return sums


def batches_of(
    exp: Experiment, text: ValidationText, view: View, done: int = 0
) -> list[np.ndarray]:
    """Returns the numbers of the pieces of each batch, without the first `done` pieces.

    Pieces are taken by their length, the shortest first. All are padded to `evaluate.max_length`,
    but a batch of short pieces has fewer positions for latents.
    """
    by_length = np.argsort(text.lengths(), kind="stable")
    size = exp.config.evaluate.batch_size
    if view(0).donor is not None:
        size //= 2  # the other half of a batch are the donors
    return [by_length[first : first + size] for first in range(done, len(by_length), size)]


def add_up(
    exp: Experiment, sums: SumsByTerm, document: np.ndarray, cases: Sequence[Case], values: Values
) -> None:
    """Adds the values of a batch to the sums of its documents, in place.

    Each token counts once for each n, under both models. Values are added in float64, piece by
    piece, so the same batches in the same order give the same bits.

    document: int64 [pieces], the document of each case.
    """
    offset_A = np.arange(exp.config.evaluate.num_ahead)
    last = exp.config.evaluate.max_length - 2

    def at(values_T: np.ndarray, before_kA: np.ndarray) -> np.ndarray:
        return values_T[np.minimum(before_kA, last)]  # what is past the end is not counted

    for row, case in enumerate(cases):
        found = values.of(row)
        before_kA = case.at[:, None] + offset_A  # the token before the n-th one ahead
        own_before_kA = case.own_at[:, None] + offset_A
        counts_kA = before_kA < len(case.plain) - 1
        for term, total in sums.items():
            plain_kA = at(found.plain[term], before_kA)
            if found.ahead is None:
                own_kA = at(found.own[term], own_before_kA)
            else:
                own_kA = found.ahead[term][: len(case.at)]
            total.tokens[document[row]] += counts_kA.sum(axis=0)
            sum_over_positions = partial(np.sum, axis=0, dtype=np.float64, where=counts_kA)
            total.decoder[document[row]] += sum_over_positions(plain_kA)
            total.augmented[document[row]] += sum_over_positions(own_kA)


# On disk: the sums of each document, and partial sums, with which a killed evaluation continues.


def write_documents(file: epath.Path, text: ValidationText, sums: SumsByTerm) -> None:
    """Writes documents.npz: the sums of each document, its source and its work."""
    about = {"source": text.source, "sources": np.array(text.sources)}
    about |= {"work": text.work, "works": np.array(text.works)}
    files.write(file, to_npz(about | _arrays(sums)))


def sum_works(documents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums the arrays of documents.npz over each work; intervals draw works, so they do not change.

    The documents of a source with a single work stay apart: its intervals draw them.
    """
    source, work = documents["source"], documents["work"]
    unit = work.copy()
    for number in np.unique(source):
        here = np.flatnonzero(source == number)
        if len(np.unique(work[here])) == 1:
            unit[here] = here - len(work)  # below zero, where no work is
    first = np.unique(unit, return_index=True)[1]
    summed = dict(documents) | {"source": source[first], "work": work[first]}
    for name, values in documents.items():
        if values.ndim == 2:
            summed[name] = intervals.sum_units(values, unit)
    return summed


class PartialSums:
    """Saves the sums of an unfinished evaluation; only the same evaluation reads them again.

    identity: everything that the sums depend on, as plain JSON data.
    """

    def __init__(self, file: epath.Path, identity: Any):
        self.file = file
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def save(self, sums: SumsByTerm, done: int) -> None:
        """Saves the sums of `done` pieces; called on process 0 alone."""
        about = {"identity": self.identity, "done": done}
        files.write(self.file, to_npz(about | _arrays(sums)))

    def restore(self, zeros: SumsByTerm) -> tuple[SumsByTerm, int]:
        """Returns the saved sums, and the number of their pieces, the same on every process.

        They are `zeros` and 0 if there is no file, or it is damaged or of another evaluation.
        """
        content = b""
        if jax.process_index() == 0:
            with store_errors(self.file):
                content = self.file.read_bytes() if self.file.exists() else b""
        content = distributed.bytes_from_first(content)
        if not content:
            return zeros, 0
        problem = "of another config, checkpoint, decoder, text or mesh"
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as saved:
                if str(saved["identity"]) == self.identity:
                    sums = {term: Sums(*(saved[name] for name in _names(term))) for term in zeros}
                    return sums, int(saved["done"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            problem = f"damaged ({' '.join(str(error).split())})"
        warn(f"{self.file} is {problem}: the evaluation starts from the beginning")
        return zeros, 0

    def remove(self) -> None:
        """Removes the file; called on process 0 alone."""
        self.file.unlink(missing_ok=True)


def _names(term: str) -> list[str]:
    """Returns the names of a term's arrays on disk; older files have those of "nll" alone."""
    if term == "nll":
        return list(Sums._fields)
    return ["tokens", f"decoder_{term}", f"augmented_{term}"]


def _arrays(sums: SumsByTerm) -> dict[str, np.ndarray]:
    """Returns the arrays of all terms, by the names under which they are stored."""
    arrays: dict[str, np.ndarray] = {}
    for term, each in sums.items():
        arrays |= zip(_names(term), each)
    return arrays


def to_npz(arrays: Mapping[str, Any]) -> bytes:
    """Returns the content of a .npz file of arrays by name."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


# Tables, as perplexity.json holds them.


def by_source(text: ValidationText, sums: SumsByTerm, seed: int) -> dict[str, Any]:
    """Returns the figures of all text, and under "sets" those of each source, for perplexity.json.

    Under "works" a source has the figures of each of its named works, unless they are many.
    """
    whole = _part(text, sums, seed, text.source >= 0)
    sets = {}
    for number, source in enumerate(text.sources):
        here = text.source == number
        sets[source] = _part(text, sums, seed, here)
        named = [work for work in np.unique(text.work[here]) if text.works[work]]
        if len(named) > FEW_WORKS:
            named = []
        works = {text.works[work]: _part(text, sums, seed, text.work == work) for work in named}
        sets[source]["works"] = works
    return whole | {"sets": sets}


def _part(
    text: ValidationText, sums: SumsByTerm, seed: int, documents: np.ndarray
) -> dict[str, Any]:
    """Returns the figures of some documents: those with True in `documents`, bool [documents]."""
    work = text.work[documents]
    return {
        **figures(jax.tree.map(lambda x: x[documents], sums), work, seed),
        "documents": len(work),
        "num_works": len(np.unique(work)),
        "interval_over": intervals.unit(work),
    }


def figures(sums: SumsByTerm, work: np.ndarray, seed: int) -> dict[str, Any]:
    """Returns the change by latents at each n, and in the mean over n.

    The change is in perplexity, percent. The ends of an interval are None where the interval cannot
    be estimated.

    Args:
      sums: by term.
      work: int [documents], the work of each document.
      seed: of the intervals.

    Returns:
      "rows", one for each n that some document reaches: the change, and the metrics in `sums`; and
      "mean", the mean of these changes.
    """
    tokens, decoder, augmented = sums["nll"]
    found = intervals.estimate(tokens, augmented - decoder, work, seed)
    total = jax.tree.map(lambda x: x.sum(axis=0), sums)
    reached = np.flatnonzero(total["nll"].tokens)
    rows = [_row(int(index), total, found.at_n) for index in reached]
    return {"rows": rows, "mean": _change(mean_change(rows), found.mean)}


def mean_change(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean over n of the changes in rows of a perplexity.json; NaN without a row."""
    changes = [row["change_percent"] for row in rows]
    return sum(changes) / len(changes) if changes else math.nan


def _change(percent: float, interval: np.ndarray) -> dict[str, float | None]:
    """Returns a change and the ends of its interval, [2], by the names in perplexity.json."""
    values = (percent, *interval.tolist())
    known = [None if math.isnan(value) else value for value in values]
    return dict(zip(("change_percent", "change_low", "change_high"), known))


def _row(index: int, total: SumsByTerm, interval: np.ndarray) -> dict[str, Any]:
    """Returns the row of n = index + 1, from total sums, [A], and intervals, percent [2, A]."""
    tokens = total["nll"].tokens[index]
    decoder = {term: sums.decoder[index] for term, sums in total.items()}
    augmented = {term: sums.augmented[index] for term, sums in total.items()}
    row = {"n": index + 1, "tokens": int(tokens)}
    for each in metric.METRICS:
        if not each.terms.keys() <= total.keys():
            continue
        row[f"decoder_{each.name}"] = float(each.pool(decoder | {"tokens": tokens}))
        row[f"augmented_{each.name}"] = float(each.pool(augmented | {"tokens": tokens}))
    more_nll = total["nll"].augmented[index] - total["nll"].decoder[index]
    return row | _change(100 * float(np.expm1(more_nll / tokens)), interval[:, index])

"""Compares all runs with one of them, document by document.

A difference that is the same in every document has a narrow interval.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine.distributed import warn
from latent_delib.measure import intervals, perplexity
from latent_delib.results import tables
from latent_delib.results.entries import entry_of, labels
from latent_delib.results.packed import DOCUMENTS, Arrays, files_below
from latent_delib.results.runs import Result, Runs
from latent_delib.results.table_format import Table


class Pair(NamedTuple):
    """Holds two evaluations of the same text, for every n that both have.

    sums: `decoder` holds the base's augmented sums. `augmented` holds the other run's.
    work: int64 [documents], the work of each document.
    over: the name of the units that intervals draw (`intervals.unit`); None: neither file records
      works.
    same_decoder: whether the frozen decoder has the same figures in both.
    """

    sums: perplexity.Sums
    work: np.ndarray
    over: str | None
    same_decoder: bool


def compare(found: Runs, against: str) -> Table:
    """Makes the table of all runs against one: the change in perplexity of the n-th token ahead.

    Only runs on the same text are in it. Intervals draw works where one of the two files records
    the works. A run whose frozen decoder has other figures is left out, with a warning.

    Raises:
      UserError: there is no documents.npz in `against`.
    """
    files = {file.path: file for file in files_below(Path(against))}
    documents = Path(against) / DOCUMENTS
    if documents not in files:
        raise UserError(f"--against={against}: holds no {DOCUMENTS}, which `evaluate` writes")
    base = files[documents].read()
    rows, used = [], []
    over: dict[str, str | None] = {}
    for result in found.perplexity:
        pair = pair_of(base, result)
        if pair is None:
            continue
        if not pair.same_decoder:
            why = f"its frozen decoder's perplexity differs from that of {against}"
            warn(f"left out {result.path.parent}: {why}")
            continue
        compared = perplexity.table({"nll": pair.sums}, pair.work, seed=0)
        rows.append({"from": result.key} | tables.changes(compared))
        used.append(result)
        over[result.key] = pair.over
    ours = list(map(entry_of, used))
    for row, entry, words in zip(rows, ours, labels(ours)):
        row |= {"latents": entry.latents, "what": words}
    title = f"Change in perplexity of the n-th token ahead against {against}"
    columns = ["latents", "what", "from", *tables.BY_N]
    return tables.make_table("13_against", title, columns, rows, used, over)


def pair_of(base: Arrays, result: Result) -> Pair | None:
    """Pairs a run with the base; None if it is of another text or has no documents.npz."""
    if result.read_documents is None:
        return None
    other = result.read_documents()
    num_ahead = min(base["tokens"].shape[1], other["tokens"].shape[1])
    there = _first(base, num_ahead)
    here = _first(other, num_ahead)
    if not np.array_equal(there.tokens, here.tokens):
        return None
    work = other.get("work", base.get("work"))
    over = None if work is None else intervals.unit(work)
    if work is None:
        work = np.arange(len(there.tokens))
    sums = perplexity.Sums(there.tokens, there.augmented, here.augmented)
    # Machines differ by rounding: the processors of docs/results/lab by up to 1.3e-5, and those of
    # docs/results/hops, whose decoder is nearly certain of each token, by up to 5.6e-5 nats.
    same_decoder = np.allclose(there.decoder, here.decoder, rtol=1e-4, atol=1e-3)
    return Pair(sums, work, over, same_decoder)


def _first(arrays: Arrays, num_ahead: int) -> perplexity.Sums:
    return perplexity.Sums(*(arrays[name][:, :num_ahead] for name in perplexity.Sums._fields))

"""Compares all runs with one of them, work by work.

A difference that is the same in every work has a narrow interval.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine.distributed import warn
from latent_delib.measure import perplexity
from latent_delib.results import tables
from latent_delib.results.entries import entry_of, labels
from latent_delib.results.packed import DOCUMENTS, Arrays, files_below
from latent_delib.results.runs import Result, Runs
from latent_delib.results.table_format import Table


class Pair(NamedTuple):
    """Holds two evaluations of the same text, for every n that both have.

    sums: `decoder` holds the base's augmented sums. `augmented` holds the other run's. Their rows
      are works, or documents where intervals draw these (`perplexity.sum_works`).
    source: int64 [rows], the source of each row; None where a file does not record works.
    work: int64 [rows], the work of each row.
    same_decoder: whether the frozen decoder has the same figures in both.
    """

    sums: perplexity.Sums
    source: np.ndarray | None
    work: np.ndarray
    same_decoder: bool


def compare(found: Runs, against: str) -> Table:
    """Makes the table of all runs against one: the change in perplexity of the n-th token ahead.

    Only runs on the same text are in it. A run whose frozen decoder has other figures is left out,
    with a warning.

    Raises:
      UserError: there is no documents.npz in `against`.
    """
    files = {file.path: file for file in files_below(Path(against))}
    documents = Path(against) / DOCUMENTS
    if documents not in files:
        raise UserError(f"--against={against}: holds no {DOCUMENTS}, which `evaluate` writes")
    base = files[documents].read()
    rows, used = [], []
    for result in found.perplexity:
        pair = pair_of(base, result)
        if pair is None:
            continue
        if not pair.same_decoder:
            why = f"its frozen decoder's perplexity differs from that of {against}"
            warn(f"left out {result.path.parent}: {why}")
            continue
        compared = perplexity.figures({"nll": pair.sums}, pair.work, seed=0)
        rows.append({"from": result.key} | tables.changes(compared))
        used.append(result)
    ours = list(map(entry_of, used))
    for row, entry, words in zip(rows, ours, labels(ours)):
        row |= {"latents": entry.latents, "what": words}
    title = f"Change in perplexity of the n-th token ahead against {against}"
    columns = ["latents", "what", "from", *tables.COLUMNS]
    return tables.make_table("13_against", title, columns, rows, used)


def pair_of(base: Arrays, result: Result) -> Pair | None:
    """Pairs a run with the base; None if it is of another text or has no documents.npz.

    Rows are documents, each a work of its own, where one of the two files does not record works.
    """
    if result.read_documents is None:
        return None
    other = result.read_documents()
    source = None
    work = np.arange(len(other["tokens"]))
    if "work" in base and "work" in other:
        base, other = perplexity.sum_works(base), perplexity.sum_works(other)
        source, work = other["source"], other["work"]
    num_ahead = min(base["tokens"].shape[1], other["tokens"].shape[1])
    there = _first(base, num_ahead)
    here = _first(other, num_ahead)
    if not np.array_equal(there.tokens, here.tokens):
        return None
    sums = perplexity.Sums(there.tokens, there.augmented, here.augmented)
    # Machines differ by rounding: the processors of docs/results/lab by up to 1.3e-5, and those of
    # docs/results/hops, whose decoder is nearly certain of each token, by up to 5.6e-5 nats.
    same_decoder = np.allclose(there.decoder, here.decoder, rtol=1e-4, atol=1e-3)
    return Pair(sums, source, work, same_decoder)


def _first(arrays: Arrays, num_ahead: int) -> perplexity.Sums:
    return perplexity.Sums(*(arrays[name][:, :num_ahead] for name in perplexity.Sums._fields))

"""All runs compared with one of them, document by document: a difference that holds in each has a narrow interval."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine.distributed import warn
from latent_delib.measure import intervals, perplexity
from latent_delib.results import packed, tables
from latent_delib.results.entries import entry_of, label
from latent_delib.results.forms import Table
from latent_delib.results.packed import Arrays
from latent_delib.results.runs import Result, Runs


class Documents(NamedTuple):
    """The sums of a documents.npz. work: int64 [N], the work each document is of; None: an older file does not say."""

    sums: perplexity.Sums
    work: np.ndarray | None


class Pair(NamedTuple):
    """Two evaluations of the same text, the first n of both: sums of the one as "decoder", of the other as "augmented".

    work: as in Documents. same_decoder: whether the frozen decoder came to the same figures in both.
    """

    sums: perplexity.Sums
    work: np.ndarray | None
    same_decoder: bool


def compare(found: Runs, against: str) -> Table:
    """Makes the table of all runs on the same text against one: the change in perplexity of the n-th token ahead.

    Intervals draw works where one of the two files says which document is of which. A run whose frozen decoder has
    other figures is left out, with a warning.

    Raises:
      UserError: there is no documents.npz in `against`.
    """
    file = packed.find_file(Path(against) / packed.DOCUMENTS)
    if file is None:
        raise UserError(f"--against={against}: holds no {packed.DOCUMENTS}, which `evaluate` writes")
    base = documents_of(file.read())
    rows, used, left_out = [], [], []
    over: dict[str, str | None] = {}
    for result in found.perplexity:
        pair = pair_of(base, result)
        if pair is None:
            continue
        if not pair.same_decoder:
            left_out.append(str(result.path.parent))
            continue
        entry = entry_of(result)
        row = {"latents": entry.latents, "what": label(entry), "from": result.key}
        rows.append(row | tables.changes(perplexity.table({"nll": pair.sums}, work_of(pair), seed=0)))
        used.append(result)
        over[result.key] = None if pair.work is None else intervals.unit(pair.work)
    if left_out:
        warn(f"--against={against}: the frozen decoder has other figures in {', '.join(left_out)}: left out")
    title = f"Change in perplexity of the n-th token ahead against {against}"
    columns = ["latents", "what", "from", *tables.BY_N]
    return tables.finished("12_against", title, columns, rows, used, over)


def documents_of(arrays: Arrays) -> Documents:
    """Reads the sums of a documents.npz."""
    sums = perplexity.Sums(*(arrays[name] for name in perplexity.Sums._fields))
    return Documents(sums, arrays.get("work"))


def pair_of(base: Documents, result: Result) -> Pair | None:
    """Returns a run beside the base; None if it has no documents.npz or is of another text."""
    if result.read_documents is None:
        return None
    other = documents_of(result.read_documents())
    num_ahead = min(base.sums.tokens.shape[1], other.sums.tokens.shape[1])
    there = _first(base.sums, num_ahead)
    here = _first(other.sums, num_ahead)
    if not np.array_equal(there.tokens, here.tokens):
        return None
    sums = perplexity.Sums(there.tokens, there.augmented, here.augmented)
    work = base.work if other.work is None else other.work
    return Pair(sums, work, np.allclose(there.decoder, here.decoder))


def _first(sums: perplexity.Sums, num_ahead: int) -> perplexity.Sums:
    return perplexity.Sums(*(x[:, :num_ahead] for x in sums))


def work_of(pair: Pair) -> np.ndarray:
    """Returns the work each document is of, int64 [N]; each is one of its own where the files do not say."""
    return np.arange(len(pair.sums.tokens)) if pair.work is None else pair.work

"""Perplexity of the n-th token ahead (Section 3.1, Table 1): which tokens count, their sums, what follows from sums.

Sums are kept for each document: how documents are pooled, and how sure a figure is, follows once all of them are there.
A document is a part of a work, a book for instance. What holds for one work may not hold for another, so intervals draw
works.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import augment
from latent_delib.delib.step import ahead_step, read_step
from latent_delib.errors import UserError
from latent_delib.job.experiment import Experiment
from latent_delib.machine import checkpoint
from latent_delib.nn.transformer import Params

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**22  # documents in the resamples that are in memory together: 32 MB
DRAWS = 2  # how `positions` and `donors` draw; 1: they went by pieces, whatever their length


class Text(NamedTuple):
    """Validation text: P pieces of N documents of W works of X sources.

    pieces: int32 [n] each, BOS first, 1 < n <= max_length. document: int64 [P], the document each piece is of.
    source: int64 [N], the source each document is of. sources: X names. work: int64 [N], the work each document is of.
    works: W names, "" where a document is a work of its own. works_known: False where older token files do not say
    which work a document is of; each then counts as one of its own.
    """

    pieces: list[np.ndarray]
    document: np.ndarray
    source: np.ndarray
    sources: tuple[str, ...]
    work: np.ndarray
    works: tuple[str, ...]
    works_known: bool = True

    def digest(self) -> str:
        """Returns the SHA-256, hex, of the pieces, and of which document and source each is of."""
        names, lengths = repr(self.sources).encode(), np.array([len(piece) for piece in self.pieces])
        parts = [*self.pieces, lengths, self.document, self.source, np.frombuffer(names, np.uint8)]
        sha = hashlib.sha256()
        for part in parts:
            sha.update(part)
        return sha.hexdigest()


class Sums(NamedTuple):
    """Of each document and n = 1 ... A: how many tokens count, int64 [N, A], and Σ -log p of them under the decoder and
    with latents, nats, float64 [N, A]."""

    tokens: np.ndarray
    decoder: np.ndarray
    augmented: np.ndarray

    def of(self, documents: np.ndarray) -> "Sums":
        return Sums(*(x[documents] for x in self))


class Steps(NamedTuple):
    """The two jitted steps, `step.read_step` and `step.ahead_step`. Compiled once: no shape depends on the text."""

    read: Callable[..., Any]
    ahead: Callable[..., Any]


def read_text(exp: Experiment) -> Text:
    """Reads every document of the validation sources, cut where longer than `max_length`; BOS begins each piece.

    With `max_pieces`, that many pieces of each source, evenly spread over it, and the documents that have some of them.
    """
    e, data = exp.config.evaluate, exp.config.data
    sources = tuple(data.validation)
    pieces: list[np.ndarray] = []
    document: list[int] = []  # of each piece
    source: list[int] = []  # of each document
    work: list[int] = []  # of each document
    numbers: dict[tuple[str, str | int], int] = {}  # of the works; one without a name goes by its document
    known = True
    for found in batches.validation_documents(data, tokenizer_path=str(exp.tokenizer.path)):
        cut = batches.pieces(found.tokens, e.max_length, exp.tokenizer.bos_id)
        pieces += cut
        document += [len(source)] * len(cut)
        source.append(sources.index(found.source))
        known = known and found.work is not None
        name = found.work or len(work)
        work.append(numbers.setdefault((found.source, name), len(numbers)))
    chosen: list[int] = []
    for number in range(len(sources)):
        there = [i for i, d in enumerate(document) if source[d] == number]
        wanted = min(e.max_pieces or len(there), len(there))
        chosen += [there[i * len(there) // wanted] for i in range(wanted)]
    if not chosen:
        raise UserError(f"config.data.validation={sources}: holds no text")
    kept, renumbered = np.unique([document[i] for i in chosen], return_inverse=True)
    of_each = np.array(source)[kept]
    kept_works, work_of_each = np.unique(np.array(work)[kept], return_inverse=True)
    if e.swap and (alone := [name for i, name in enumerate(sources) if np.count_nonzero(of_each == i) == 1]):
        raise UserError(
            f"config.evaluate.swap: {alone[0]!r} of config.data.validation has one document among the pieces"
        )
    if not known:
        checkpoint.warn(
            f"config.data.token_files: {data.token_files} does not say which work a document is of, so intervals draw "
            "documents; `prepare` the text again, with another --out, for intervals over works"
        )
    names = [name if isinstance(name, str) else "" for _, name in numbers]
    works = tuple(names[i] for i in kept_works)
    return Text([pieces[i] for i in chosen], renumbered, of_each, sources, work_of_each, works, known)


def positions(seed: int, number: int, length: int, most: int, longest: int, first: int = 0) -> np.ndarray:
    """Returns after which tokens of piece `number`, of `length` tokens, latents are put: int64 [k], ascending.

    All from `first` on that have a next token. With `most`, that many of a piece of `longest` tokens, and of a shorter
    one its share, so that each token of the text is as likely as any other. The draw is a function of the seed and the
    number of the piece alone.
    """
    usable, of_longest = max(0, length - 1 - first), longest - 1 - first
    if not most or most >= of_longest:
        return first + np.arange(usable)
    draw = np.random.default_rng([seed, number])
    share, rest = divmod(usable * most, of_longest)
    share += draw.integers(of_longest) < rest  # rounded so that its mean is exact
    return first + np.sort(draw.choice(usable, share, replace=False))


def chosen_positions(exp: Experiment, text: Text, number: int) -> np.ndarray:
    """Returns `positions` of piece `number` by the config."""
    e = exp.config.evaluate
    return positions(e.seed, number, len(text.pieces[number]), e.max_positions, e.max_length, e.longer_prompt)


def donors(seed: int, text: Text) -> np.ndarray:
    """Draws for each piece another whose latents it is given with `swap`, int64 [P].

    One of another document of the same source: another kind of text would be told from its own by the kind alone. At
    random among those at least as long, which have a token at each of its positions; where there are none, the longest.
    """
    length = np.array([len(piece) for piece in text.pieces])
    document, source = text.document, text.source[text.document]
    at_random = np.random.default_rng(seed).permutation(len(document))
    found = np.empty(len(document), np.int64)
    for i, piece in enumerate(at_random):
        others = np.roll(at_random, -i)
        others = others[(document[others] != document[piece]) & (source[others] == source[piece])]
        found[piece] = others[np.argmax(np.minimum(length[others], length[piece]))]
    return found


def last_position(exp: Experiment, piece: np.ndarray) -> int:
    """Returns the last position of a donor that latents can be written after."""
    return max(len(piece) - 1, exp.config.evaluate.longer_prompt)


def past_donors(exp: Experiment, text: Text) -> int:
    """Counts the positions that, with `swap`, lie past the end of their donor: given are the latents after its end."""
    count = 0
    for number, donor in enumerate(donors(exp.config.evaluate.seed, text)):
        last = last_position(exp, text.pieces[donor])
        count += int(np.count_nonzero(chosen_positions(exp, text, number) > last))
    return count


def jit_steps(exp: Experiment) -> Steps:
    """Jits the steps for the config's mesh. Raises UserError if a batch does not split over it."""
    e, aug, whole = exp.config.evaluate, exp.aug, mesh_lib.replicated(exp.mesh)
    B = e.batch_size
    if B % (shards := mesh_lib.row_shards(exp.mesh)):
        raise UserError(f"config.evaluate.batch_size={B} does not split over {shards} devices")
    return Steps(
        jax.jit(partial(read_step, aug=aug, dtype=exp.dtype), out_shardings=(None, whole)),
        jax.jit(partial(ahead_step, aug=aug, num_ahead=e.num_ahead, delay=e.delay), out_shardings=whole),
    )


def zeros(exp: Experiment, text: Text) -> Sums:
    """Returns the sums that adding up begins with."""
    shape = (len(text.source), exp.config.evaluate.num_ahead)
    return Sums(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))


class Batch(NamedTuple):
    """What is computed at once.

    pieces: int32 [n] each. chosen: after which tokens of each piece latents are put. givers: the pieces whose latents
    each is given, one for one; none: its own.
    """

    pieces: list[np.ndarray]
    chosen: list[np.ndarray]
    givers: list[np.ndarray]


class Values(NamedTuple):
    """-log p of a batch, nats, float32, on the host.

    plain: [B, T - 1], of each next token, under the decoder that everything is compared with. own: [B, T - 1], the same
    under the one that is evaluated, without latents. ahead: [B, K, A], with latents after K positions; None: a method
    without latents.
    """

    plain: np.ndarray
    own: np.ndarray
    ahead: np.ndarray | None

    def of(self, row: int) -> "Values":
        return Values(self.plain[row], self.own[row], None if self.ahead is None else self.ahead[row])


def add_up(
    exp: Experiment, steps: Steps, frozen: Params, trainable: Params, text: Text, sums: Sums, done: int = 0
) -> Iterator[int]:
    """Adds to `sums`, in place, all pieces but the first `done`, a batch at a time; yields how many are done by then.

    Pieces go by length, those alike together for least padding. Each position's value is added once for each n, in
    float64, with and without latents for the same targets, and always in the same order: who goes on from a number this
    yielded ends with the same bits. Every process gets every value and adds up all of them.

    A piece is read once, and again by a decoder that was trained; its cache then serves all its positions, `positions`
    of them at a time. So the device holds the cache of batch_size x max_length tokens and traces at batch_size x
    positions, and the host one batch's values, batch_size x max_length x num_ahead, however long a document is. Of the
    whole text the host holds the tokens and the sums.

    With `longer_prompt`=N only the decoder that everything is compared with reads a piece whole: to the model that is
    evaluated, the first N tokens after BOS are lost. Latents cost about as much as reading 2 N_L tokens.

    With `swap` half of a batch is counted; the other half are the pieces whose latents those are given, one for one, at
    the same positions.

    Args:
      frozen: the decoder that everything is compared with, and what lies below the trainable tree.
    """
    e = exp.config.evaluate
    order = np.argsort([len(piece) for piece in text.pieces], kind="stable")
    donor = donors(e.seed, text) if e.swap else None
    at_once = e.batch_size // 2 if e.swap else e.batch_size
    params = augment.assemble(frozen, trainable)
    for first in range(done, len(order), at_once):
        numbers = order[first : first + at_once]
        pieces = [text.pieces[i] for i in numbers]
        chosen = [chosen_positions(exp, text, i) for i in numbers]
        givers = [] if donor is None else [text.pieces[i] for i in donor[numbers]]
        values = _values(exp, steps, frozen, params, "decoder" in trainable, Batch(pieces, chosen, givers))
        for row, i in enumerate(numbers):
            _add(exp, sums, text.document[i], len(pieces[row]), chosen[row], values.of(row))
        yield first + len(numbers)


def _values(exp: Experiment, steps: Steps, frozen: Params, params: Params, trained: bool, batch: Batch) -> Values:
    """Computes a batch under the frozen decoder and under `params`; `trained`: these have another decoder."""
    N = exp.config.evaluate.longer_prompt
    texts = [*batch.pieces, *batch.givers]
    text_BT = _place_text(exp, texts)
    ours, plain = steps.read({"decoder": frozen["decoder"]}, *text_BT)
    own = plain
    if N:  # BOS stays
        text_BT = _place_text(exp, [np.delete(piece, slice(1, 1 + N)) for piece in texts])
    if N or trained:
        ours, own = steps.read(params, *text_BT)
    M = _traces_at_once(exp)
    at = _trace_positions(exp, batch, M)
    swapped = (_place(exp, _rows_of_givers(exp, len(batch.pieces))),) if batch.givers else ()
    parts = [
        steps.ahead(params, ours, *text_BT, _place(exp, at[:, start : start + M]), *swapped)[0]
        for start in range(0, at.shape[1] if exp.aug.has_latents else 0, M)
    ]
    # Read only now that the device has all it needs to go on.
    plain, own = np.asarray(plain), np.asarray(own)
    return Values(plain, own, np.concatenate([np.asarray(part) for part in parts], axis=1) if parts else None)


def _place(exp: Experiment, x: np.ndarray) -> jax.Array:
    """Puts the rows of a batch on the devices that compute them."""
    B = exp.config.evaluate.batch_size
    return mesh_lib.place_rows(exp.mesh, x[mesh_lib.local_rows(exp.mesh, B)], B)


def _place_text(exp: Experiment, pieces: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Places tokens and segments of a batch, int32 [B, T] each, padded."""
    shape = (exp.config.evaluate.batch_size, exp.config.evaluate.max_length)
    tokens, segment = np.full(shape, exp.tokenizer.pad_id, np.int32), np.zeros(shape, np.int32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        segment[row, : len(piece)] = 1
    return _place(exp, tokens), _place(exp, segment)


def _traces_at_once(exp: Experiment) -> int:
    """Returns how many traces of a piece are computed together: no more than are chosen, but split over the mesh."""
    e, shards = exp.config.evaluate, exp.mesh.shape["traces"]
    M = min(e.positions, e.max_length)
    return min(M, -(-e.max_positions // shards) * shards) if e.max_positions else M


def _trace_positions(exp: Experiment, batch: Batch, M: int) -> np.ndarray:
    """Returns where latents are written in each piece, and at the same places in each giver: int32 [B, multiple of M].

    Filled up with T - 1, which has no ahead tokens.
    """
    e = exp.config.evaluate
    columns = max(1, -(-max(map(len, batch.chosen)) // M)) * M
    at = np.full((e.batch_size, columns), e.max_length - 1, np.int32)
    for row, positions_k in enumerate(batch.chosen):
        at[row, : len(positions_k)] = positions_k - e.longer_prompt
    for row, piece in enumerate(batch.givers):
        at[len(batch.pieces) + row] = np.minimum(at[row], last_position(exp, piece) - e.longer_prompt)
    return at


def _rows_of_givers(exp: Experiment, counted: int) -> np.ndarray:
    """Returns the row whose latents each row is given, int64 [B]: the givers follow the `counted` pieces."""
    rows = np.arange(exp.config.evaluate.batch_size)
    rows[:counted] += counted
    return rows


def _add(exp: Experiment, sums: Sums, document: int, length: int, at: np.ndarray, values: Values) -> None:
    """Adds a piece of `length` tokens, with latents after tokens `at` [k], to the sums of its document."""
    e = exp.config.evaluate
    before_kA = at[:, None] + np.arange(e.num_ahead)  # the token before the n-th one ahead
    counts_kA = before_kA < length - 1
    index_kA = np.minimum(before_kA, e.max_length - 2)
    plain_kA = values.plain[index_kA]
    ours_kA = values.own[index_kA - e.longer_prompt] if values.ahead is None else values.ahead[: len(at)]
    sums.tokens[document] += counts_kA.sum(axis=0)
    sums.decoder[document] += plain_kA.sum(axis=0, dtype=np.float64, where=counts_kA)
    sums.augmented[document] += ours_kA.sum(axis=0, dtype=np.float64, where=counts_kA)


def over(work: np.ndarray) -> str:
    """Names the things that `interval` draws, where documents are of these works.

    "works"; "documents", where each is a work of its own; "documents of one work", which tell nothing of other works.
    """
    works = len(np.unique(work))
    if works == len(work) > 1:
        return "documents"
    return "works" if works > 1 else "documents of one work"


def interval(sums: Sums, work: np.ndarray, seed: int) -> np.ndarray:
    """Estimates from where to where the change of perplexity, in %, goes over works: float64 [2, A].

    A bootstrap's 2.5th and 97.5th percentile over RESAMPLES draws: of W works W are drawn, and of each of these as many
    documents as it has. NaN for an n that only one document reaches, or only one of several works: one says nothing of
    others. Draws without any token of an n do not count for it.

    Args:
      work: int [N], the work each document is of.
    """
    N, A = sums.tokens.shape
    enough = np.count_nonzero(sums.tokens, axis=0) > 1
    works = np.unique(work)
    if len(works) > 1:
        reached = [sums.tokens[work == each].any(axis=0) for each in works]
        enough &= np.count_nonzero(reached, axis=0) > 1
    found = np.full((2, A), np.nan)
    if not enough.any():
        return found
    by_work = np.argsort(work, kind="stable")
    size = np.unique(work, return_counts=True)[1]
    each = np.concatenate([(sums.augmented - sums.decoder)[:, enough], sums.tokens[:, enough]], axis=1)[by_work]
    draw, at_once, sampled = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // N), []
    for first in range(0, RESAMPLES, at_once):
        resamples = range(first, min(first + at_once, RESAMPLES))
        times_RN = np.array([_resample(draw, size) for _ in resamples], np.float64)
        sampled.append(times_RN @ each)  # sums over each resample, by how many times it has a document
    change, tokens = np.split(np.concatenate(sampled), 2, axis=1)
    changes = np.divide(change, tokens, out=np.full_like(change, np.nan), where=tokens > 0)
    found[:, enough] = 100 * np.expm1(np.nanpercentile(changes, [2.5, 97.5], axis=0))
    return found


def _resample(draw: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """Draws how many times a resample has each document, int [N], those of a work together.

    Args:
      size: int [W], how many documents each work has.
    """
    works = draw.integers(len(size), size=len(size))
    first = np.cumsum(size) - size  # the first document of each work
    drawn_from = np.repeat(works, size[works])  # for each document that is drawn
    documents = first[drawn_from] + draw.integers(size[drawn_from])
    return np.bincount(documents, minlength=size.sum())


def summary(sums: Sums, work: np.ndarray, seed: int, works_known: bool = True) -> dict[str, Any]:
    """Returns the part of perplexity.json on some documents: their table, their number, what the intervals draw."""
    return {
        "rows": table(sums, work, seed),
        "documents": len(work),
        "num_works": len(np.unique(work)),
        "interval_over": over(work) if works_known else None,
    }


def table(sums: Sums, work: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Makes one row for each n that some document reaches; its interval is None where `interval` has none."""
    rows = []
    totals = zip(*(x.sum(axis=0) for x in sums), *interval(sums, work, seed))
    for n, (tokens, decoder, augmented, low, high) in enumerate(totals, start=1):
        if tokens:
            rows.append(
                {
                    "n": n,
                    "tokens": int(tokens),
                    "decoder_ppl": float(np.exp(decoder / tokens)),
                    "augmented_ppl": float(np.exp(augmented / tokens)),
                    "change_percent": 100 * float(np.expm1((augmented - decoder) / tokens)),
                    "change_low": None if np.isnan(low) else float(low),
                    "change_high": None if np.isnan(high) else float(high),
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]], over: str | None) -> str:
    """Writes the table as plain text: n = 1, 2, 4, 8, ..."""
    interval = f"95 % interval over {over or 'documents of unknown works'}"
    lines = [f"{'n':>3} {'tokens':>10} {'decoder':>10} {'augmented':>10} {'change':>9}   {interval}"]
    for row in rows:
        if row["n"] & (row["n"] - 1) == 0:
            known = row["change_low"] is not None
            lines.append(
                f"{row['n']:>3} {row['tokens']:>10,} {row['decoder_ppl']:>10.4f} {row['augmented_ppl']:>10.4f} "
                f"{row['change_percent']:>+8.2f}%"
                + (f"   [{row['change_low']:+.2f}, {row['change_high']:+.2f}]" if known else "   one alone")
            )
    return "\n".join(lines)

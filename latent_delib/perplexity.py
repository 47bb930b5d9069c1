"""Perplexity of the n-th token ahead (Section 3.1, Table 1): which tokens count, their sums, what follows from sums.

Sums are kept for each document: how documents are pooled, and how sure a figure is, follows once all of them are there.
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
from latent_delib.errors import UserError
from latent_delib.experiment import Experiment
from latent_delib.nn.transformer import Params
from latent_delib.step import ahead_step, read_step

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**22  # documents in the resamples that are in memory together: 32 MB


class Text(NamedTuple):
    """Validation text: P pieces of N documents of X sources.

    pieces: int32 [n] each, BOS first, 1 < n <= max_length. document: int64 [P], the document each piece is of.
    source: int64 [N], the source each document is of. sources: X names.
    """

    pieces: list[np.ndarray]
    document: np.ndarray
    source: np.ndarray
    sources: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256, hex, of all of it."""
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
    """Every document of the validation sources, cut where longer than `max_length`; BOS begins each piece.

    With `max_pieces`, that many pieces of each source, evenly spread over it, and the documents that have some of them.
    """
    e, data = exp.config.evaluate, exp.config.data
    sources = tuple(data.validation)
    if repeated := sorted({s for s in sources if sources.count(s) > 1}):
        raise UserError(f"config.data.validation: {repeated[0]!r} is listed twice, expected each source once")
    pieces: list[np.ndarray] = []
    document: list[int] = []  # of each piece
    source: list[int] = []  # of each document
    for name, tokens in batches.validation_documents(data, tokenizer_path=str(exp.tokenizer.path)):
        cut = batches.pieces(tokens, e.max_length, exp.tokenizer.bos_id)
        pieces += cut
        document += [len(source)] * len(cut)
        source.append(sources.index(name))
    chosen: list[int] = []
    for number in range(len(sources)):
        there = [i for i, d in enumerate(document) if source[d] == number]
        wanted = min(e.max_pieces or len(there), len(there))
        chosen += [there[i * len(there) // wanted] for i in range(wanted)]
    if not chosen:
        raise UserError(f"config.data.validation={sources}: holds no text")
    kept, renumbered = np.unique([document[i] for i in chosen], return_inverse=True)
    of_each = np.array(source)[kept]
    if e.swap and (alone := [name for i, name in enumerate(sources) if np.count_nonzero(of_each == i) == 1]):
        raise UserError(
            f"config.evaluate.swap: {alone[0]!r} of config.data.validation has one document among the pieces"
        )
    return Text([pieces[i] for i in chosen], renumbered, of_each, sources)


def positions(seed: int, number: int, length: int, most: int, first: int = 0) -> np.ndarray:
    """After which tokens of piece `number`, of `length` tokens, latents are put: int64 [k], ascending.

    All from `first` on that have a next token; with `most`, at most that many of them, drawn by the seed and the number
    of the piece alone.
    """
    usable = max(0, length - 1 - first)
    if not most or most >= usable:
        return first + np.arange(usable)
    return first + np.sort(np.random.default_rng([seed, number]).choice(usable, most, replace=False))


def donors(seed: int, text: Text) -> np.ndarray:
    """Of each piece a random piece of another document, int64 [P]; of its own source: latents of another kind of text
    would be told from its own by the kind alone."""
    document, source = text.document, text.source[text.document]
    at_random = np.random.default_rng(seed).permutation(len(document))
    found = np.empty(len(document), np.int64)
    for i, piece in enumerate(at_random):
        others = np.roll(at_random, -i)
        fit = (document[others] != document[piece]) & (source[others] == source[piece])
        found[piece] = others[np.argmax(fit)]
    return found


def jit_steps(exp: Experiment) -> Steps:
    """The steps for the config's mesh. Raises UserError if a batch does not split over it."""
    e, aug, whole = exp.config.evaluate, exp.aug, mesh_lib.replicated(exp.mesh)
    B = e.batch_size
    if B % (shards := mesh_lib.row_shards(exp.mesh)):
        raise UserError(f"config.evaluate.batch_size={B} does not split over {shards} devices")
    return Steps(
        jax.jit(partial(read_step, aug=aug, dtype=exp.dtype), out_shardings=(None, whole)),
        jax.jit(partial(ahead_step, aug=aug, num_ahead=e.num_ahead, delay=e.delay), out_shardings=whole),
    )


def zeros(exp: Experiment, text: Text) -> Sums:
    """Where adding up begins."""
    shape = (len(text.source), exp.config.evaluate.num_ahead)
    return Sums(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))


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

    With `swap` half of a batch is counted; the other half are the pieces whose latents those are given, one for one.

    Args:
      frozen: the decoder that everything is compared with, and what lies below the trainable tree.
    """
    e, has_latents = exp.config.evaluate, exp.aug.has_latents
    A, B, T, M = e.num_ahead, e.batch_size, e.max_length, min(e.positions, e.max_length)
    N = e.longer_prompt
    if e.max_positions:  # no longer than what is chosen, but still split over the mesh
        shards = exp.mesh.shape["traces"]
        M = min(M, -(-e.max_positions // shards) * shards)
    order = np.argsort([len(piece) for piece in text.pieces], kind="stable")
    donor = donors(e.seed, text) if e.swap else None
    at_once = B // 2 if e.swap else B
    here = mesh_lib.local_rows(exp.mesh, B)

    def place(x: np.ndarray) -> jax.Array:
        return mesh_lib.place_rows(exp.mesh, x[here], B)

    def place_text(pieces: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        tokens, segment = np.full((B, T), exp.tokenizer.pad_id, np.int32), np.zeros((B, T), np.int32)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)], segment[row, : len(piece)] = piece, 1
        return place(tokens), place(segment)

    params = augment.assemble(frozen, trainable)
    for first in range(done, len(order), at_once):
        batch = order[first : first + at_once]
        counted = len(batch)
        if donor is not None:
            batch = np.concatenate([batch, donor[batch]])
        pieces = [text.pieces[i] for i in batch]
        chosen = [positions(e.seed, int(i), len(p), e.max_positions, N) for i, p in zip(batch, pieces)]
        at = np.full((B, max(1, -(-max(map(len, chosen)) // M)) * M), T - 1, np.int32)  # T - 1 has no ahead tokens
        for row, positions_k in enumerate(chosen):
            at[row, : len(positions_k)] = positions_k - N
            if row >= counted:  # a longer piece is to be given latents of text too
                at[row] = np.resize(positions_k - N, at.shape[1])
        text_BT = place_text(pieces)
        ours, plain_nll = steps.read({"decoder": frozen["decoder"]}, *text_BT)
        own_nll = plain_nll
        if N:  # BOS stays
            text_BT = place_text([np.delete(piece, slice(1, 1 + N)) for piece in pieces])
        if N or "decoder" in trainable:
            ours, own_nll = steps.read(params, *text_BT)
        from_B = np.arange(B)
        from_B[:counted] += counted
        swap = (place(from_B),) if e.swap else ()
        parts = [
            steps.ahead(params, ours, *text_BT, place(at[:, start : start + M]), *swap)[0]
            for start in range(0, at.shape[1] if has_latents else 0, M)
        ]
        # Read only now that the device has all it needs to go on.
        plain_BT, own_BT = np.asarray(plain_nll), np.asarray(own_nll)
        ahead = np.concatenate([np.asarray(nll) for nll in parts], axis=1) if has_latents else None
        for row, (i, piece, positions_k) in enumerate(zip(batch[:counted], pieces, chosen)):
            before_kA = positions_k[:, None] + np.arange(A)  # the token before the n-th one ahead
            counts_kA = before_kA < len(piece) - 1
            index_kA = np.minimum(before_kA, T - 2)
            plain_kA = plain_BT[row, index_kA]
            ours_kA = own_BT[row, index_kA - N] if ahead is None else ahead[row, : len(positions_k)]
            document = text.document[i]
            sums.tokens[document] += counts_kA.sum(axis=0)
            sums.decoder[document] += plain_kA.sum(axis=0, dtype=np.float64, where=counts_kA)
            sums.augmented[document] += ours_kA.sum(axis=0, dtype=np.float64, where=counts_kA)
        yield first + counted


def interval(sums: Sums, seed: int) -> np.ndarray:
    """From where to where the change of perplexity, in %, goes over documents: float64 [2, A].

    A bootstrap's 2.5th and 97.5th percentile over RESAMPLES draws of N of the N documents. NaN for an n that fewer than
    two documents reach: one says nothing of others. Draws without any token of an n do not count for it.
    """
    N, A = sums.tokens.shape
    enough = np.count_nonzero(sums.tokens, axis=0) > 1
    found = np.full((2, A), np.nan)
    if not enough.any():
        return found
    each = np.concatenate([(sums.augmented - sums.decoder)[:, enough], sums.tokens[:, enough]], axis=1)
    draw, at_once, sampled = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // N), []
    for first in range(0, RESAMPLES, at_once):
        resamples = range(first, min(first + at_once, RESAMPLES))
        times_RN = np.array([np.bincount(draw.integers(N, size=N), minlength=N) for _ in resamples], np.float64)
        sampled.append(times_RN @ each)  # sums over each resample, by how many times it has a document
    change, tokens = np.split(np.concatenate(sampled), 2, axis=1)
    changes = np.divide(change, tokens, out=np.full_like(change, np.nan), where=tokens > 0)
    found[:, enough] = 100 * np.expm1(np.nanpercentile(changes, [2.5, 97.5], axis=0))
    return found


def table(sums: Sums, seed: int) -> list[dict[str, Any]]:
    """One row for each n that some document reaches; its interval is None where `interval` has none."""
    rows = []
    totals = zip(*(x.sum(axis=0) for x in sums), *interval(sums, seed))
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


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The table in plain text: n = 1, 2, 4, 8, ..."""
    lines = [f"{'n':>3} {'tokens':>10} {'decoder':>10} {'augmented':>10} {'change':>9}   95 % interval"]
    for row in rows:
        if row["n"] & (row["n"] - 1) == 0:
            known = row["change_low"] is not None
            lines.append(
                f"{row['n']:>3} {row['tokens']:>10,} {row['decoder_ppl']:>10.4f} {row['augmented_ppl']:>10.4f} "
                f"{row['change_percent']:>+8.2f}%"
                + (f"   [{row['change_low']:+.2f}, {row['change_high']:+.2f}]" if known else "   one document")
            )
    return "\n".join(lines)

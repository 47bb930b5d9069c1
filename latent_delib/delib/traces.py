"""Traces: where the cache is augmented, and the positions of latents and ahead tokens.

A trace at text token p of a document holds L latents and A ahead tokens. It sees the document's
text up to p, and itself causally, but never another trace (Liu et al. 2025, Section 2.3 and Figure
2). Latents *join* where the decoder reads them. Positions and visibility are integers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.nn.attention.primitive import Bounds


class Placement(NamedTuple):
    """Says where a trace's latents stand. The trace is at text token x_p, whose position is p.

    Placements differ in these three fields alone. The positions of latents and of the tokens after
    them must not decrease along a trace: windows rely on it
    (`nn.attention.primitive.within_window`).

    latents: L -> the positions of the L latents minus p, int [L].
    shift: L -> the number of positions by which the text after the latents moves on.
    reread: 1 where x_p is read again after the latents instead of from the cache; else 0.
    """

    latents: Callable[[int], np.ndarray]
    shift: Callable[[int], int]
    reread: int


# In "after", the last latent predicts ahead token 1. In the others x_p, read again after the
# latents, predicts it.
PLACEMENTS = {
    # The paper's: latents follow x_p, and the text after them moves on by L.
    "after": Placement(lambda L: np.arange(1, L + 1), shift=lambda L: L, reread=0),
    # Latents take the positions from p on, and x_p moves on by L.
    "before": Placement(lambda L: np.arange(L), shift=lambda L: L, reread=1),
    # Latents share the positions p-L+1 ... p with text tokens, which do not move.
    "overlay": Placement(lambda L: np.arange(1 - L, 1), shift=lambda L: 0, reread=1),
    # All latents share the position of x_p, which does not move.
    "shared": Placement(lambda L: np.zeros(L, int), shift=lambda L: 0, reread=1),
}


def positions_added(placement: str, num_latents: int) -> int:
    """Returns how many positions a text needs beyond its own.

    They are for its latents, or for the tokens that these move.
    """
    place = PLACEMENTS[placement]
    furthest = max(place.latents(num_latents), default=0)
    return int(max(place.shift(num_latents), furthest))


def group_offsets(num_ahead: int, every: int) -> np.ndarray:
    """Returns how many tokens after x_p each group of latents joins, int [groups].

    Groups recur while there are ahead tokens to predict. With `every` 0 there is one group, at x_p.
    """
    return np.arange(0, num_ahead, every or num_ahead)


def reading_order(num_latents: int, num_ahead: int, placement: str, every: int) -> np.ndarray:
    """Returns the order in which the decoder reads a trace's latents and inputs, int [S].

    Entries are indices into the latents of all groups, followed by the inputs. A group of latents
    is read just before the input at which it joins.

    Args:
      num_latents: number of latents in a group.
      num_ahead, placement, every: as for `lay_out`.
    """
    latents = np.repeat(group_offsets(num_ahead, every), num_latents)
    inputs = _input_offsets(num_ahead, placement)
    return np.argsort(np.concatenate([latents, inputs]), kind="stable")


def _input_offsets(num_ahead: int, placement: str) -> np.ndarray:
    """Returns the number of tokens from x_p to each input."""
    return np.arange(1 - PLACEMENTS[placement].reread, num_ahead)


class Traces(NamedTuple):
    """Holds M traces in each of B rows. Arrays are int32 unless noted.

    S = L + the number of inputs. Where latents recur, L counts the latents of all groups.

    latent_position: positions of latents in the coprocessor's call, [B, M, L].
    latent_bounds: visible ranges of latents in the coprocessor's call.
    position: positions in the decoder's call, [B, M, S], of latents and inputs in `reading_order`.
    bounds: visible ranges in the decoder's call.
    inputs: text tokens that the decoder reads after the latents, [B, M, A - 1 + reread].
    ahead: indices of the ahead tokens in the row, [B, M, A]; some may be past its end.
    targets: the ahead tokens [B, M, A]. Each is predicted at the input or latent just before it.
    weights: weights of the targets, float32 [B, M, A]; 0 past the end of the document that holds p.
    """

    latent_position: jax.Array
    latent_bounds: Bounds
    position: jax.Array
    bounds: Bounds
    inputs: jax.Array
    ahead: jax.Array
    targets: jax.Array
    weights: jax.Array


def document_start(segment_BT: jax.Array) -> jax.Array:
    """Returns the index of the first token of the document that holds each token, int32 [B, T]."""
    index = jnp.arange(segment_BT.shape[1])
    first = jnp.diff(segment_BT, axis=1, prepend=segment_BT[:, :1] - 1) != 0
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def ends_with(tokens_BT: jax.Array, ending: Sequence[int]) -> jax.Array:
    """Returns whether the text up to each token ends with the tokens `ending`, bool [B, T]."""
    T = tokens_BT.shape[1]
    found_BT = jnp.ones(tokens_BT.shape, bool)
    for back, token in enumerate(reversed(ending)):
        earlier_BT = jnp.pad(tokens_BT, ((0, 0), (back, 0)), constant_values=-1)[:, :T]
        found_BT &= earlier_BT == token
    return found_BT


def follows_prompt(
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    prompt_end: Sequence[int],
) -> jax.Array:
    """Returns whether a prompt has ended at or before each token of its document, bool [B, T].

    An empty `prompt_end` gives True everywhere.
    """
    index = jnp.arange(tokens_BT.shape[1])
    end_BT = jax.lax.cummax(jnp.where(ends_with(tokens_BT, prompt_end), index, -1), axis=1)
    return end_BT >= document_start(segment_BT)


def first_ahead(tokens_BT: jax.Array, steps_end: Sequence[int]) -> jax.Array:
    """Returns the index of the first ahead token of a trace at each token, int32 [B, T].

    Without `steps_end` the first ahead token is the next token. With it, the first ahead token
    follows the next occurrence of the tokens `steps_end`, so that the steps are skipped. An index
    of T or more means that there is none.
    """
    T = tokens_BT.shape[1]
    end_BT = jnp.where(ends_with(tokens_BT, steps_end), jnp.arange(T), T)
    return jax.lax.cummin(end_BT, axis=1, reverse=True) + 1


def draw(
    key: jax.Array,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    num_traces: int,
    prompt_end: Sequence[int] = (),
    steps_end: Sequence[int] = (),
) -> jax.Array:
    """Draws distinct trace positions, each with at least one ahead token in its own document.

    Args:
      tokens_BT: int32 text.
      segment_BT: int32 document number of each token, 0 on padding.
      num_traces: M.
      prompt_end: tokens with which the text must end at each position; empty for any text.
      steps_end: see `first_ahead`.

    Returns:
      int32 [B, M], sorted. A row with fewer than M such positions repeats T - 1, which has no ahead
      tokens and so no weight.
    """
    beyond = [(0, 0), (0, 2)]  # `first_ahead` is at most T + 1
    first_BT = first_ahead(tokens_BT, steps_end)
    there_BT = jnp.take_along_axis(jnp.pad(segment_BT, beyond), first_BT, axis=1)
    has_ahead = (there_BT == segment_BT) & (segment_BT > 0)
    fits = (has_ahead & ends_with(tokens_BT, prompt_end))[:, :-1]
    # The highest scores win. They are uniform, as published. For another distribution take Gumbel
    # noise plus the log-probability of each position: that draws without replacement.
    score = jnp.where(fits, jax.random.uniform(key, fits.shape), -jnp.inf)
    score, at = jax.lax.top_k(score, num_traces)
    last = segment_BT.shape[1] - 1
    return jnp.sort(jnp.where(score > -jnp.inf, at, last), axis=1).astype(jnp.int32)


def draw_delays(key: jax.Array, at_BM: jax.Array, max_delay: int) -> jax.Array:
    """Draws each trace's delay of its latents: 0 to max_delay tokens, int32 [B, M]."""
    return jax.random.randint(key, at_BM.shape, 0, max_delay + 1)


def lay_out(
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    num_latents: int,
    num_ahead: int,
    placement: str,
    delay_BM: jax.Array | int = 0,
    every: int = 0,
    steps_end: Sequence[int] = (),
    visible_text: int = 0,
) -> Traces:
    """Lays out the traces at text tokens `at_BM` of packed rows. See `Traces`.

    Args:
      tokens_BT: int32 text.
      segment_BT: int32 document number of each token, 0 on padding.
      at_BM: int32 text tokens at which the cache is augmented.
      num_latents: number of latents in a group.
      num_ahead: A.
      placement: a key of PLACEMENTS; where latents recur, a placement that does not move the text.
      delay_BM: number of tokens by which the coprocessor is called earlier, at the earliest at the
        document's first token. It knows the text only up to there, but its latents still join at
        `at_BM`, like latents of an asynchronous coprocessor.
      every: number of ahead tokens after which latents join again, and stay; 0: they join once.
      steps_end: see `first_ahead`. Ahead tokens have the positions that they would have without
        the steps.
      visible_text: number of text tokens, x_p the last of them, that the decoder's latents and
        ahead tokens still see; 0: all. The coprocessor sees all of them in any case.
    """
    place = PLACEMENTS[placement]
    T = tokens_BT.shape[1]

    def take(row_BT: jax.Array, index_BMX: jax.Array) -> jax.Array:
        flat = jnp.clip(index_BMX, 0, T - 1).reshape(index_BMX.shape[0], -1)
        return jnp.take_along_axis(row_BT, flat, axis=1).reshape(index_BMX.shape)

    # The place: x_p in the row, its document's first token, and the position of x_p.
    at = jnp.maximum(at_BM, 0)[..., None]  # -1 in rows that only fill a batch
    start = take(document_start(segment_BT), at)
    p = at - start

    # The coprocessor's call: latents, after the last token that it knows.
    delay = jnp.broadcast_to(delay_BM, at_BM.shape)[..., None]
    known = jnp.maximum(p - delay, 0)
    from_p = np.add.outer(group_offsets(num_ahead, every), place.latents(num_latents)).reshape(-1)
    latent_position = jnp.maximum(known + from_p, 0)
    latent_bounds = _bounds(start, start + known + 1, latent_position)

    # The decoder's call: latents, x_p if it is read again, and all ahead tokens but the last.
    reread_token = at[..., : place.reread]
    ahead = take(first_ahead(tokens_BT, steps_end), at) + jnp.arange(num_ahead)
    inputs = take(tokens_BT, jnp.concatenate([reread_token, ahead[..., :-1]], axis=-1))
    offset = _input_offsets(num_ahead, placement)
    input_position = p + offset + place.shift(num_latents)
    position = jnp.concatenate([jnp.maximum(p + from_p, 0), input_position], axis=-1)
    if every:
        position = position[..., reading_order(num_latents, num_ahead, placement, every)]
    first_visible = jnp.maximum(at + 1 - visible_text, start) if visible_text else start
    cache_stop = at + 1 - place.reread  # text before this is read from the cache
    bounds = _bounds(first_visible, cache_stop, position)

    segment = take(segment_BT, at)
    same_document = (ahead < T) & (take(segment_BT, ahead) == segment) & (segment > 0)
    return Traces(
        latent_position=latent_position,
        latent_bounds=latent_bounds,
        position=position,
        bounds=bounds,
        inputs=inputs,
        ahead=ahead,
        targets=take(tokens_BT, ahead),
        weights=same_document.astype(jnp.float32),
    )


def _bounds(start: jax.Array, stop: jax.Array, like: jax.Array) -> Bounds:
    """Returns bounds of the text from `start` to before `stop`, in the shape of `like`."""

    def fit(x: jax.Array | int) -> jax.Array:
        return jnp.broadcast_to(x, like.shape).astype(jnp.int32)

    return Bounds(fit(start), fit(stop), fit(0))

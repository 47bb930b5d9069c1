"""Decoding with a growing cache: the prompt, latents when they are due, tokens in between.

Latents and the tokens after them are a trace, as in training (`delib.traces`). The cache holds the
text as the plain decoder read it, then latents, then the tokens decoded since. Before new latents
join, the cache is rolled back: the tokens after the old latents are read again as plain text, and
the new latents follow them. So the next token depends only on the text and on the place of the
last latents, as in training (`delib.augment.loss`). Latents that recur (`Method.recurs`) are not
rolled back: new latents join the cache as it is.

`decode_in_chunks` is the loop; its compiled functions are in `lm.compiled`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from latent_delib import mesh as mesh_lib
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents, Reading
from latent_delib.lm import compiled
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.nn import cache as cache_lib
from latent_delib.nn.cache import Cache
from latent_delib.nn.transformer import Params


class Joined(NamedTuple):
    """Records that latents joined a batch.

    after: number of new tokens before them.
    rows: bool [B], the rows that were still being continued.
    """

    after: int
    rows: np.ndarray


class Waiting(NamedTuple):
    """Holds latents that have not joined yet.

    asked: number of new tokens when they were asked for.
    """

    z: Latents
    asked: int


def decode_in_chunks(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    options: GenerationOptions,
    *,
    aug: Augmentation,
    write: Callable[[Reading, jax.Array], Latents | None] | None,
    room: int,
    eos_ids: Sequence[int],
    pad_id: int,
    stopped: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, list[Joined]]]:
    """Continues a batch of prompts, and yields the new tokens after each chunk.

    Args:
      text_BT: prompts, BOS first, padded on the right.
      length_B: their lengths; 0 for a row that only fills the batch.
      key_B: a random key for each row.
      write: starts writing latents for the text that was read, and returns them. It returns None
        where it failed, and is then not called again. Without `write` the plain decoder continues.
      room: number of tokens for which the caches have space after T, at least max_new_tokens.
      eos_ids: the tokens that end a row.
      stopped: gets the new tokens [B, n] after each chunk, and returns which rows end, bool [B].

    Yields:
      The new tokens so far, int32 [B, max_new_tokens], padded after the last one and after EOS; and
      each time that latents joined.
    """
    state, reading = compiled.prefill(params, text_BT, length_B, aug=aug, room=room, pad_id=pad_id)
    cache: Cache = reading.cache
    read_more = partial(compiled.read_on, params, aug=aug)
    eos_E = np.asarray(eos_ids, np.int32)
    decode = partial(compiled.decode_tokens, params, aug=aug, eos_E=eos_E, pad_id=pad_id)
    index_BN = np.asarray(length_B)[:, None] + np.arange(options.max_new_tokens)
    made = 0  # new tokens
    num_read = 0  # new tokens that `reading` holds
    due = None if write is None else 0  # the number of new tokens at which latents are asked for
    waiting: Waiting | None = None
    joined: list[Joined] = []
    while made < options.max_new_tokens:
        if due is not None and made >= due and waiting is None:
            reading = read_more(reading, cache, state.text, made - num_read)
            num_read = made
            z = write(reading, state.text)
            if z is None:
                due = None
            else:
                waiting = Waiting(z, asked=made)
                due = made + options.every if options.every else None
        if waiting is not None:
            arrived = _arrived(waiting, made, options.delay)
            if arrived is None:  # writing failed
                waiting = due = None
            elif arrived:
                reading = read_more(reading, cache, state.text, made - num_read)
                num_read = made
                state, cache = compiled.join(params, state, reading.cache, waiting.z, aug=aug)
                joined.append(Joined(made, ~np.asarray(state.ended)))
                waiting = None
        if due is None and waiting is None:
            reading = None  # no more latents will join
        elif cache is reading.cache:
            cache = jax.tree.map(jnp.copy, cache)  # decoding overwrites this copy
        until = _next_stop(options, made, due, waiting)
        state, cache = decode(state, cache, key_B, options.sampler, until - made)
        made = until
        new_BN = np.take_along_axis(np.asarray(state.text), index_BN, axis=1)
        ended = np.asarray(state.ended) | stopped(new_BN[:, :made])
        yield new_BN, joined
        if ended.all():
            return
        state = state._replace(ended=jax.device_put(ended, state.ended.sharding))


def _next_stop(
    options: GenerationOptions, made: int, due: int | None, waiting: Waiting | None
) -> int:
    """Returns the number of new tokens at which the next chunk ends.

    Args:
      made: new tokens now.
      due: the number at which latents are asked for next; None: never again.
      waiting: latents that have not joined yet, or None.
    """
    until = min(options.max_new_tokens, made + options.chunk)
    if due is not None:
        until = min(until, max(due, made + 1))
    if waiting is not None:
        until = min(until, made + 1 if options.delay is None else waiting.asked + options.delay)
    return until


# Latents that were asked for and have not joined yet.


def _arrived(waiting: Waiting, made: int, delay: int | None) -> bool | None:
    """Tells whether latents join now, after `made` new tokens.

    None: writing them failed, so they never join.
    """
    if delay is not None:
        return made == waiting.asked + delay
    return attempt(ready, waiting.z)


def ready(z: Latents) -> bool:
    """Tells, without waiting, whether latents are computed.

    Raises the error of their computation, if it failed.
    """
    if not all(x.is_ready() for x in jax.tree.leaves(z)):
        return False
    jax.block_until_ready(z)
    return True


def attempt(action: Callable, *args: Any) -> Any:
    """Returns action(*args), or None with a warning where it fails.

    The decoder then goes on without its coprocessor.
    """
    try:
        return action(*args)
    except Exception as error:
        message = f"the coprocessor failed, the decoder goes on without new latents: {error!r}"
        warnings.warn(message, stacklevel=3)
        return None


def write_beside(
    params: Params,
    aug: Augmentation,
    mesh: Mesh,
    home: Mesh,
    reading: Reading,
    text_BX: jax.Array,
) -> Latents:
    """Starts writing latents on the coprocessor's own devices, without waiting for them.

    The cache of the text is copied to these devices, and the latents are copied back.

    Args:
      params, aug, mesh: the coprocessor's.
      home: the mesh of the decoder.
      reading, text_BX: the text as it was read, and its tokens, on `home`.
    """
    row = mesh_lib.rows(mesh)
    kv = NamedSharding(mesh, mesh_lib.spec(cache_lib.AXES, mesh_lib.ACTIVATIONS))
    cache = Cache(kv, kv, row, row)
    assistant = None if reading.assistant is None else cache
    reading = jax.device_put(reading, Reading(row, cache, assistant))
    z = compiled.write_after(params, reading, jax.device_put(text_BX, row), aug=aug)
    return jax.device_put(z, mesh_lib.rows(home))

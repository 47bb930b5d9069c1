"""Decoding with a growing cache: the prompt, latents when they are due, tokens in between.

What follows an augmentation is a trace like any in training (`delib.traces`): the cache holds the
text as the plain decoder read it, then latents, then the tokens decoded since. Before new latents
join, the cache is rolled back: the tokens decoded since are read again as plain text, and the new
latents follow them. So the next token depends on the text and on where latents were last written,
as `delib.augment.loss` trained it to. Latents that recur (`Method.recurs`) stay instead: the next
ones join the cache as it is.

`looks` is the loop. The functions below "Compiled" are compiled once for each shape.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents, Reading
from latent_delib.delib.traces import Traces
from latent_delib.lm import batching
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.lm.sampling import Sampler
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.transformer import Params, Transformer


class Decoding(NamedTuple):
    """Holds a batch in the middle of decoding; all rows have equally many new tokens.

    text: int32 [B, X], prompts and new tokens, left-aligned.
    length: int32 [B], tokens of it.
    position: int32 [B], of the next token.
    logits: float32 [B, V], of the next token.
    ended: bool [B], only padding follows.
    """

    text: jax.Array
    length: jax.Array
    position: jax.Array
    logits: jax.Array
    ended: jax.Array


def run(*args: Any, **options: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """Continues a batch of prompts to its end; returns the last of `looks`."""
    *_, last = looks(*args, **options)
    return last


def looks(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    options: GenerationOptions,
    *,
    aug: Augmentation,
    write: Callable[[Reading, jax.Array], Latents | None] | None,
    room: int,
    eos_id: int,
    pad_id: int,
    stopped: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Continues a batch of prompts, and yields it each time that it looks up from decoding.

    Args:
      text_BT: prompts, BOS first, padded on the right.
      length_B: their lengths; 0 for a row that only fills the batch.
      key_B: a random key for each row.
      write: starts writing latents for the text that was read, and returns them; None: it failed,
        and is asked no more. Without it, the decoder as it is.
      room: tokens that the caches have room for after T, at least max_new_tokens.
      stopped: gets the new tokens [B, n] at each look, and returns which rows end, bool [B].

    Yields:
      The new tokens so far, int32 [B, max_new_tokens], padded after these and after EOS; and after
      how many of them latents joined.
    """
    state, plain = prefill(params, text_BT, length_B, aug=aug, room=room, pad_id=pad_id)
    cache: Cache = plain.cache
    read_more = partial(read_on, params, aug=aug)
    decode = partial(decode_tokens, params, aug=aug, eos_id=eos_id, pad_id=pad_id)
    made = 0  # new tokens
    held = 0  # those of them that `plain` holds
    asked = 0  # those there when latents were last asked for
    due = None if write is None else 0  # the number of new tokens at which latents are asked for
    z: Latents | None = None  # on their way
    joined: list[int] = []
    while made < options.max_new_tokens:
        if due is not None and made >= due and z is None:
            plain = read_more(plain, cache, state.text, made - held)
            held = asked = made
            z = write(plain, state.text)
            again = options.every and z is not None  # without z it failed
            due = made + options.every if again else None
        if z is not None:
            arrived = _arrived(z, made - asked, options.delay)
            if arrived is None:  # they failed
                z = due = None
            elif arrived:
                plain = read_more(plain, cache, state.text, made - held)
                held = made
                state, cache = join(params, state, plain.cache, z, aug=aug)
                joined.append(made)
                z = None
        if due is None and z is None:
            plain = None  # no more latents will join
        elif cache is plain.cache:
            cache = jax.tree.map(jnp.copy, cache)  # decoding overwrites what it is given
        until = _next_look(options, made, due, None if z is None else asked)
        state, cache = decode(state, cache, key_B, options.sampler, until - made)
        made = until
        new_BN = np.asarray(_new_tokens(state.text, length_B, options.max_new_tokens))
        ended = np.asarray(state.ended) | stopped(new_BN[:, :made])
        yield new_BN, tuple(joined)
        if ended.all():
            return
        state = state._replace(ended=jax.device_put(ended, state.ended.sharding))


def _next_look(options: GenerationOptions, made: int, due: int | None, asked: int | None) -> int:
    """Returns the number of new tokens at which `looks` looks up from decoding.

    Args:
      made: new tokens now.
      due: the number at which latents are asked for.
      asked: the number at which the latents on their way were asked for.
    """
    until = min(options.max_new_tokens, made + options.chunk)
    if due is not None:
        until = min(until, max(due, made + 1))
    if asked is not None:
        until = min(until, made + 1 if options.delay is None else asked + options.delay)
    return until


@partial(jax.jit, static_argnums=2)
def _new_tokens(text_BX: jax.Array, length_B: jax.Array, count: int) -> jax.Array:
    """Returns the `count` tokens after each prompt."""
    return jnp.take_along_axis(text_BX, length_B[:, None] + jnp.arange(count), axis=1)


def read_on(
    params: Params,
    read: Reading,
    cache: Cache,
    text_BX: jax.Array,
    new: int,
    *,
    aug: Augmentation,
) -> Reading:
    """Reads the next `new` tokens of every text, after those that were read."""
    if aug.every:  # latents stay: `cache`, with which these tokens were decoded, has read them
        return read._replace(cache=cache)
    if new == 0:
        return read
    return _extend(params, read, text_BX, new, aug=aug, size=batching.power(new))


# Latents on their way.


def _arrived(z: Latents, waited: int, delay: int | None) -> bool | None:
    """Tells whether latents join now, `waited` tokens after they were asked for.

    None: they never will.
    """
    if delay is not None:
        return waited == delay
    return attempt(ready, z)


def ready(z: Latents) -> bool:
    """Tells, without waiting, whether latents are there.

    Raises the error that they turned out to be.
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
    read: Reading,
    text_BX: jax.Array,
) -> Latents:
    """Starts writing latents on devices of the coprocessor's own, without waiting for them.

    The text that was read travels to these devices, latents travel back.

    Args:
      params, aug: the coprocessor's, as they lie on `mesh`.
      home: the mesh of the decoder.
      read, text_BX: the text and its tokens, on `home`.
    """
    row = mesh_lib.rows(mesh)
    kv = NamedSharding(mesh, mesh_lib.spec(cache_lib.AXES, mesh_lib.ACTIVATIONS))
    cache = Cache(kv, kv, row, row)
    read = jax.device_put(read, Reading(row, cache, read.assistant and cache))
    z = write_after(params, read, jax.device_put(text_BX, row), aug=aug)
    return jax.device_put(z, mesh_lib.rows(home))


# Compiled.


@partial(jax.jit, static_argnames=("aug", "room", "pad_id"))
def prefill(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    *,
    aug: Augmentation,
    room: int,
    pad_id: int,
) -> tuple[Decoding, Reading]:
    """Reads the prompts; leaves room for `room` more tokens, and in the cache for latents."""
    output_VD = transformer.output_table(params["decoder"])
    segment_BT = batching.one_segment(text_BT, length_B)
    read = augment.read_text(aug, params, text_BT, segment_BT, output_VD.dtype)
    last_BD = jnp.take_along_axis(read.outputs, (length_B - 1)[:, None, None], axis=1)[:, 0]
    state = Decoding(
        text=jnp.pad(text_BT, [(0, 0), (0, room)], constant_values=pad_id),
        length=length_B,
        position=length_B,
        logits=transformer.unembed(output_VD, last_BD, aug.transformer.config),
        ended=length_B == 0,
    )
    more = room + aug.count_latents(room)
    outputs_BXD = jnp.pad(read.outputs, [(0, 0), (0, more), (0, 0)])
    with_room = partial(cache_lib.with_room, more=more, length_B=length_B)
    assistant = read.assistant and _place(aug, with_room(read.assistant))
    return state, Reading(outputs_BXD, _place(aug, with_room(read.cache)), assistant)


def _place(aug: Augmentation, cache: Cache) -> Cache:
    """Puts rows and heads of a cache where they are used."""
    constrain = aug.transformer.partition.constrain
    k = constrain(cache.k, cache_lib.AXES)
    v = constrain(cache.v, cache_lib.AXES)
    return cache._replace(k=k, v=v)


@partial(jax.jit, static_argnames=("aug", "size"))
def _extend(
    params: Params,
    read: Reading,
    text_BX: jax.Array,
    new: jax.Array,
    *,
    aug: Augmentation,
    size: int,
) -> Reading:
    """Reads on by `new` tokens, at most `size`."""
    # The index of each token, which in plain text is its position too.
    index_BS = read.cache.length[:, None] + jnp.arange(size)
    tokens_BS = jnp.take_along_axis(text_BX, jnp.minimum(index_BS, text_BX.shape[1] - 1), axis=1)

    def more(room: str, cache: Cache) -> tuple[jax.Array, Cache]:
        model = aug.readers[room]
        x_BSD, kv = _decode_more(model, params[room], tokens_BS, index_BS, cache)
        cache = cache_lib.append(cache, kv, index_BS, jnp.full_like(cache.length, new))
        return x_BSD, _place(aug, cache)

    out_BSD, cache = more("decoder", read.cache)
    row = jnp.arange(len(text_BX))[:, None]
    outputs_BXD = read.outputs.at[row, index_BS].set(out_BSD, mode="drop")
    assistant = read.assistant and more("assistant", read.assistant)[1]
    return Reading(outputs_BXD, cache, assistant)


def _decode_more(
    model: Transformer,
    weights: Params,
    tokens_BS: jax.Array,
    position_BS: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, KV]:
    """Runs a plain decoder over S more tokens.

    They see all the cache, and each other causally.
    """
    x_BMSD = transformer.embed(weights["embedding"], tokens_BS, model.config)[:, None]
    zero = jnp.zeros_like(position_BS)[:, None]
    bounds = Bounds(zero, zero + cache.length[:, None, None], zero)
    x_BMSD, kv = model.apply({"params": weights}, x_BMSD, position_BS[:, None], bounds, cache)
    return x_BMSD[:, 0], kv


def _trace(aug: Augmentation, text_BX: jax.Array, length_B: jax.Array) -> Traces:
    """Lays out one trace per row, at the last token of its text."""
    segment_BX = batching.one_segment(text_BX, length_B)
    return aug.lay_out(text_BX, segment_BX, length_B[:, None] - 1, num_ahead=1)


@partial(jax.jit, static_argnames=("aug",))
def write_after(params: Params, read: Reading, text_BX: jax.Array, *, aug: Augmentation) -> Latents:
    """Writes latents after the text that was read, one trace per row.

    Of the parameters it uses the coprocessor's alone.
    """
    return augment.write_latents(aug, params, read, _trace(aug, text_BX, read.cache.length))


@partial(jax.jit, static_argnames=("aug",))
def join(
    params: Params,
    state: Decoding,
    plain: Cache,
    z: Latents,
    *,
    aug: Augmentation,
) -> tuple[Decoding, Cache]:
    """Puts latents after the text so far, which `plain` holds, with earlier latents if these stay.

    Returns the state and the cache to decode with.
    """
    now = _trace(aug, state.text, state.length)
    reread = now.inputs.shape[2]  # the last token's entry gives way to latents and the token itself
    read = plain._replace(length=plain.length - reread)
    stop = jnp.broadcast_to(read.length[:, None, None], now.position.shape)
    now = now._replace(bounds=now.bounds._replace(prefix_stop=stop))
    out_BMAD, kv = augment.decode(aug, params, z, read, now)
    count_B = jnp.full_like(read.length, aug.num_latents + reread)
    cache = cache_lib.append(read, kv, now.position[:, 0], count_B)
    output_VD = transformer.output_table(params["decoder"])
    state = state._replace(
        position=now.position[:, 0, -1] + 1,
        logits=transformer.unembed(output_VD, out_BMAD[:, 0, -1], aug.transformer.config),
    )
    # Latents may share positions with text before them.
    return state, _place(aug, cache_lib.by_position(cache))


@partial(jax.jit, static_argnames="aug", donate_argnames="cache")
def decode_tokens(
    params: Params,
    state: Decoding,
    cache: Cache,
    key_B: jax.Array,
    sampler: Sampler,
    count: jax.Array,
    *,
    aug: Augmentation,
    eos_id: int,
    pad_id: int,
) -> tuple[Decoding, Cache]:
    """Decodes `count` more tokens in every row, fewer when all rows have ended.

    A row's draws depend on its own key and on the number of tokens before, on no other row.
    """
    config = aug.transformer.config
    decoder = params["decoder"]
    output_VD = transformer.output_table(decoder)
    row = jnp.arange(state.length.shape[0])
    goal = state.length[0] + count

    def one_token(carry: tuple[Decoding, Cache]) -> tuple[Decoding, Cache]:
        state, cache = carry
        token_B = sampler(jax.vmap(jax.random.fold_in)(key_B, state.length), state.logits)
        token_B = jnp.where(state.ended, pad_id, token_B)
        position_B1 = state.position[:, None]
        x_BSD, kv = _decode_more(aug.transformer, decoder, token_B[:, None], position_B1, cache)
        after = Decoding(
            text=state.text.at[row, state.length].set(token_B),
            length=state.length + 1,
            position=state.position + 1,
            logits=transformer.unembed(output_VD, x_BSD[:, 0], config),
            ended=state.ended | (token_B == eos_id),
        )
        one_B = jnp.ones_like(state.length)
        return after, cache_lib.append(cache, kv, position_B1, one_B)

    def goes_on(carry: tuple[Decoding, Cache]) -> jax.Array:
        return (carry[0].length[0] < goal) & ~jnp.all(carry[0].ended)

    return jax.lax.while_loop(goes_on, one_token, (state, cache))

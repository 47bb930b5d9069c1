"""The compiled functions of decoding: they read prompts, let latents join, and decode tokens.

Each function is compiled once for each shape. `lm.decoding` calls them in turn.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents, Reading
from latent_delib.delib.traces import PLACEMENTS, Traces
from latent_delib.lm import batching
from latent_delib.lm.sampling import Sampler
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.transformer import Params, Transformer


class Decoding(NamedTuple):
    """Holds a batch in the middle of decoding; all rows have equally many new tokens.

    text: int32 [B, X], prompts and new tokens, left-aligned.
    length: int32 [B], number of tokens in each text.
    position: int32 [B], position id of the next token.
    logits: float32 [B, V], logits of the next token.
    ended: bool [B], True where only padding follows.
    """

    text: jax.Array
    length: jax.Array
    position: jax.Array
    logits: jax.Array
    ended: jax.Array


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
    """Reads the prompts. Adds space for `room` more tokens, and in the caches also for latents."""
    output_VD = transformer.output_table(params["decoder"])
    segment_BT = batching.one_segment(text_BT, length_B)
    reading = augment.read_text(aug, params, text_BT, segment_BT)
    last_BD = jnp.take_along_axis(reading.outputs, (length_B - 1)[:, None, None], axis=1)[:, 0]
    state = Decoding(
        text=jnp.pad(text_BT, [(0, 0), (0, room)], constant_values=pad_id),
        length=length_B,
        position=length_B,
        logits=transformer.unembed(output_VD, last_BD, aug.decoder.config),
        ended=length_B == 0,
    )
    more = room + aug.count_latents(room)
    outputs_BXD = jnp.pad(reading.outputs, [(0, 0), (0, more), (0, 0)])
    extended = partial(cache_lib.extended, more=more, length_B=length_B)
    assistant = None
    if reading.assistant is not None:
        assistant = _place(aug, extended(reading.assistant))
    cache = _place(aug, extended(reading.cache))
    return state, reading._replace(outputs=outputs_BXD, cache=cache, assistant=assistant)


def _place(aug: Augmentation, cache: Cache) -> Cache:
    """Puts rows and heads of a cache onto the devices that use them."""
    constrain = aug.decoder.partition.constrain
    k = constrain(cache.k, cache_lib.AXES)
    v = constrain(cache.v, cache_lib.AXES)
    return cache._replace(k=k, v=v)


def read_on(
    params: Params,
    reading: Reading,
    cache: Cache,
    text_BX: jax.Array,
    new: int,
    *,
    aug: Augmentation,
) -> Reading:
    """Returns `reading` extended by `new` tokens of every text, so that latents can follow them.

    Where latents recur, its cache becomes `cache`, which holds these tokens and earlier latents.
    """
    if aug.every:  # earlier latents stay, and `cache` holds them
        return reading._replace(cache=cache)
    if new == 0:
        return reading
    return _extend(params, reading, text_BX, new, aug=aug, size=batching.power_of_two(new))


@partial(jax.jit, static_argnames=("aug", "size"))
def _extend(
    params: Params,
    reading: Reading,
    text_BX: jax.Array,
    new: jax.Array,
    *,
    aug: Augmentation,
    size: int,
) -> Reading:
    """Reads on by `new` tokens, at most `size`."""
    # The index of each token, which in plain text is its position too.
    index_BS = reading.cache.length[:, None] + jnp.arange(size)
    tokens_BS = jnp.take_along_axis(text_BX, jnp.minimum(index_BS, text_BX.shape[1] - 1), axis=1)

    def more(reader: str, cache: Cache) -> tuple[jax.Array, Cache]:
        model = aug.readers[reader]
        x_BSD, kv = _decode_more(model, params[reader], tokens_BS, index_BS, cache)
        cache = cache_lib.append(cache, kv, index_BS, jnp.full_like(cache.length, new))
        return x_BSD, _place(aug, cache)

    out_BSD, cache = more("decoder", reading.cache)
    row = jnp.arange(len(text_BX))[:, None]
    outputs_BXD = reading.outputs.at[row, index_BS].set(out_BSD, mode="drop")
    assistant = None
    if reading.assistant is not None:
        _, assistant = more("assistant", reading.assistant)
    return reading._replace(outputs=outputs_BXD, cache=cache, assistant=assistant)


def _decode_more(
    model: Transformer,
    weights: Params,
    tokens_BS: jax.Array,
    position_BS: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, KV]:
    """Runs a plain decoder over S more tokens.

    Each token sees all of the cache, and the other new tokens causally.
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
def write_after(
    params: Params, reading: Reading, text_BX: jax.Array, *, aug: Augmentation
) -> Latents:
    """Writes latents after the text that was read, one trace per row.

    It uses only the coprocessor's parameters.
    """
    traces = _trace(aug, text_BX, reading.cache.length)
    return augment.write_latents(aug, params, reading, traces)


@partial(jax.jit, static_argnames=("aug",))
def join(
    params: Params,
    state: Decoding,
    plain: Cache,
    z: Latents,
    *,
    aug: Augmentation,
) -> tuple[Decoding, Cache]:
    """Appends latents to the text so far.

    Args:
      plain: the cache of the text, and of earlier latents where latents stay.
      z: the latents.

    Returns:
      The state and the cache to decode with.
    """
    traces = _trace(aug, state.text, state.length)
    # The cache loses the entry of a token that is read again, and those of text that is out of
    # sight. Then it gains those of the latents and of the token that is read again.
    reread = PLACEMENTS[aug.placement].reread
    seen = plain._replace(length=jnp.maximum(plain.length - reread, 0))
    if aug.visible_text:
        seen = cache_lib.last_entries(seen, aug.visible_text - reread)
    zero = jnp.zeros_like(traces.position)
    stop = jnp.broadcast_to(seen.length[:, None, None], traces.position.shape)
    traces = traces._replace(bounds=Bounds(zero, stop, zero))
    out_BMAD, kv = augment.decode(aug, params, z, seen, traces)
    count_B = jnp.full_like(seen.length, aug.num_latents + reread)
    cache = cache_lib.append(seen, kv, traces.position[:, 0], count_B)
    output_VD = transformer.output_table(params["decoder"])
    state = state._replace(
        position=state.length + PLACEMENTS[aug.placement].shift(aug.num_latents),
        logits=transformer.unembed(output_VD, out_BMAD[:, 0, -1], aug.decoder.config),
    )
    if any(aug.decoder.config.is_local):  # a window is a range of positions
        cache = cache_lib.by_position(cache)  # latents may share positions with text before them
    return state, _place(aug, cache)


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
    eos_E: jax.Array,
    pad_id: int,
) -> tuple[Decoding, Cache]:
    """Decodes `count` more tokens in every row, fewer when all rows have ended.

    A row's draws depend on its own key and on the number of tokens before, not on other rows.

    eos_E: the tokens that end a row, int32 [E].
    """
    config = aug.decoder.config
    decoder = params["decoder"]
    output_VD = transformer.output_table(decoder)
    row = jnp.arange(state.length.shape[0])
    goal = state.length[0] + count

    def one_token(carry: tuple[Decoding, Cache]) -> tuple[Decoding, Cache]:
        state, cache = carry
        token_B = sampler(jax.vmap(jax.random.fold_in)(key_B, state.length), state.logits)
        token_B = jnp.where(state.ended, pad_id, token_B)
        position_B1 = state.position[:, None]
        x_BSD, kv = _decode_more(aug.decoder, decoder, token_B[:, None], position_B1, cache)
        after = Decoding(
            text=state.text.at[row, state.length].set(token_B),
            length=state.length + 1,
            position=state.position + 1,
            logits=transformer.unembed(output_VD, x_BSD[:, 0], config),
            ended=state.ended | jnp.isin(token_B, eos_E),
        )
        one_B = jnp.ones_like(state.length)
        return after, cache_lib.append(cache, kv, position_B1, one_B)

    def goes_on(carry: tuple[Decoding, Cache]) -> jax.Array:
        return (carry[0].length[0] < goal) & ~jnp.all(carry[0].ended)

    return jax.lax.while_loop(goes_on, one_token, (state, cache))

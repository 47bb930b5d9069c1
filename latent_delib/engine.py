"""Decoding token by token with a growing cache: prefill, latents once, then the decoder as it is."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.attention import Bounds
from latent_delib.nn.cache import Cache
from latent_delib.nn.transformer import Params


class Decoding(NamedTuple):
    """A batch in the middle of decoding.

    text: int32 [B, X], prompts and what was sampled, left-aligned. length: int32 [B], tokens of it.
    cache: what the decoder has read. position: int32 [B], of the next token. logits: float32 [B, V], of the next
    token. ended: bool [B], EOS was sampled. key: of the next sample.
    """

    text: jax.Array
    length: jax.Array
    cache: Cache
    position: jax.Array
    logits: jax.Array
    ended: jax.Array
    key: jax.Array


def sample(key: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """A token of each row, int32 [B]: the likeliest where temperature is 0, else one of the smallest set of likeliest
    tokens whose probabilities reach `top_p`."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(temperature > 0, _draw, lambda *_: likeliest_B, key, logits_BV, temperature, top_p)


def _draw(key: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sorting a vocabulary costs more than reading a small decoder: only where something is drawn."""
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    sorted_BV = jnp.sort(jax.nn.softmax(scaled_BV), axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    kept_BV = jnp.where(jax.nn.softmax(scaled_BV) >= least_B1, scaled_BV, -jnp.inf)
    return jax.random.categorical(key, kept_BV).astype(jnp.int32)


@partial(jax.jit, static_argnames=("aug", "dtype", "max_new_tokens", "augmented", "delay", "eos_id", "pad_id"))
def generate(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    aug: Augmentation,
    dtype: jnp.dtype,
    max_new_tokens: int,
    augmented: bool,
    delay: int,
    eos_id: int,
    pad_id: int,
) -> jax.Array:
    """Continuations int32 [B, max_new_tokens], padded after EOS.

    Args:
      text_BT: prompts, BOS first, padded on the right; length_B: their lengths.
      augmented: whether latents of the prompt join the cache, once, after `delay` more tokens were decoded (the
        asynchronous coprocessor of Section 3.7; 0: at the end of the prompt).
    """
    T = text_BT.shape[1]
    config = aug.transformer.config
    segment_BT = (jnp.arange(T) < length_B[:, None]).astype(jnp.int32)
    out_BTD, prompt = augment.read(aug, params, text_BT, segment_BT, dtype)
    prompt = prompt._replace(length=length_B)

    def logits_of(x_BD: jax.Array) -> jax.Array:
        return transformer.unembed(params["decoder"]["embedding"], x_BD, config)

    room = [(0, 0), (0, max_new_tokens)]
    capacity = [(0, 0), (0, max_new_tokens + (aug.num_latents if augmented else 0))]
    state = Decoding(
        text=jnp.pad(text_BT, room, constant_values=pad_id),
        length=length_B,
        cache=prompt._replace(
            k=jnp.pad(prompt.k, [(0, 0), *capacity, (0, 0), (0, 0)]),
            v=jnp.pad(prompt.v, [(0, 0), *capacity, (0, 0), (0, 0)]),
            position=jnp.pad(prompt.position, capacity),
        ),
        position=length_B,
        logits=logits_of(jnp.take_along_axis(out_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]),
        ended=jnp.zeros_like(length_B, bool),
        key=key,
    )

    def one_token(state: Decoding) -> Decoding:
        key, now = jax.random.split(state.key)
        token_B = jnp.where(state.ended, pad_id, sample(now, state.logits, temperature, top_p))
        ended = state.ended | (token_B == eos_id)
        x_BMSD = transformer.embed(params["decoder"]["embedding"].astype(dtype), token_B[:, None, None], config)
        position_BMS, stop_BMS = state.position[:, None, None], state.cache.length[:, None, None]
        bounds = Bounds(jnp.zeros_like(stop_BMS), stop_BMS, jnp.zeros_like(stop_BMS))
        out_BMSD, kv = aug.transformer.apply({"params": params["decoder"]}, x_BMSD, position_BMS, bounds, state.cache)
        row = jnp.arange(token_B.shape[0])
        return Decoding(
            text=state.text.at[row, state.length].set(token_B),
            length=state.length + 1,
            cache=cache_lib.append(state.cache, kv, position_BMS[:, 0], jnp.ones_like(state.length)),
            position=state.position + 1,
            logits=logits_of(out_BMSD[:, 0, 0]),
            ended=ended,
            key=key,
        )

    def until(state: Decoding, count: int) -> Decoding:
        return jax.lax.while_loop(lambda s: jnp.any(s.length < length_B + count) & ~jnp.all(s.ended), one_token, state)

    def insert(state: Decoding) -> Decoding:
        """Latents of the prompt join after the text so far: one trace, at its last token, that the cache keeps."""

        def trace_at(length_B: jax.Array):
            segment = (jnp.arange(state.text.shape[1]) < length_B[:, None]).astype(jnp.int32)
            return aug.lay_out(state.text, segment, length_B[:, None] - 1, num_ahead=1)

        z_BMLD = augment.latents(aug, params, prompt, trace_at(length_B))
        now = trace_at(state.length)
        reread = now.inputs.shape[2]  # the last token's entry gives way to latents and the token itself
        read = state.cache._replace(length=state.cache.length - reread)
        out_BMAD, kv = augment.decode(aug, params, z_BMLD, read, now)
        cache = cache_lib.append(read, kv, now.position[:, 0], jnp.full_like(length_B, aug.num_latents + reread))
        return state._replace(
            cache=cache_lib.by_position(cache),  # latents may share positions with text that stands before them
            position=now.position[:, 0, -1] + 1,
            logits=logits_of(out_BMAD[:, 0, -1]),
        )

    if augmented:
        state = insert(until(state, min(delay, max_new_tokens)))
    state = until(state, max_new_tokens)
    return jnp.take_along_axis(state.text, length_B[:, None] + jnp.arange(max_new_tokens), axis=1)

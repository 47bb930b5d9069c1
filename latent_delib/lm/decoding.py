"""Decoding with a growing cache: the prompt, latents when they are due, and the decoder token by token in between.

What follows an augmentation is a trace like any in training (`delib.traces`): the cache holds the text as the plain
decoder read it, then latents, then what was decoded since. When latents are written again, all that gives way: those
tokens are read once more, as plain text, and the new latents follow them. So what the model says of a token depends on
the text and on where latents were last written, and it is what `delib.augment.loss` trained it to say there.

Every function but `run` is compiled, once for each shape; `run` is the loop that calls them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents, Text
from latent_delib.delib.traces import Traces
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.cache import Cache
from latent_delib.nn.transformer import Params

CHUNK = 16  # tokens decoded between two looks at them


class Sampling(NamedTuple):
    """How tokens are chosen. temperature: 0 takes the likeliest. top_k: from that many likeliest tokens; 0: from all.
    top_p: from the smallest set of likeliest tokens that reach it together. key: one of each row, [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array


class Decoding(NamedTuple):
    """A batch in the middle of decoding; all rows have got as many new tokens.

    text: int32 [B, X], prompts and what was decoded, left-aligned. length: int32 [B], tokens of it. position: int32
    [B], of the next token. logits: float32 [B, V], of the next token. ended: bool [B], only padding follows.
    """

    text: jax.Array
    length: jax.Array
    position: jax.Array
    logits: jax.Array
    ended: jax.Array


class Coprocessor(Protocol):
    """Who writes latents for `run`: at once, after a fixed delay, or whenever it is ready (`asynchronous`)."""

    def ask(self, read: Text, text_BX: jax.Array, made: int) -> None:
        """Latents of the text that was read are wanted; `made` new tokens are there."""

    def answer(self, made: int) -> Latents | None:
        """Latents of one trace a row, once, when they have come."""

    def next_look(self, made: int) -> int | None:
        """The number of new tokens at which to ask for the answer again; None: no answer is to come."""


class Delayed:
    """Latents arrive exactly `delay` tokens after they were asked for: the published simulation of an asynchronous
    coprocessor, and with 0 the synchronous one."""

    def __init__(self, write: Callable[[Text, jax.Array], Latents], delay: int):
        self.write, self.delay = write, delay
        self.due: int | None = None

    def ask(self, read: Text, text_BX: jax.Array, made: int) -> None:
        self.due, self.latents = made + self.delay, self.write(read, text_BX)

    def answer(self, made: int) -> Latents | None:
        if made != self.due:
            return None
        self.due = None
        return self.latents

    def next_look(self, made: int) -> int | None:
        return self.due


class Absent:
    """No coprocessor: the decoder as it is."""

    def ask(self, read: Text, text_BX: jax.Array, made: int) -> None: ...

    def answer(self, made: int) -> None: ...

    def next_look(self, made: int) -> None: ...


def run(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    sampling: Sampling,
    coprocessor: Coprocessor,
    *,
    aug: Augmentation,
    room: int,
    max_new_tokens: int,
    every: int,
    eos_id: int,
    pad_id: int,
    look: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Continuations int32 [B, max_new_tokens], padded after EOS, and after how many of their tokens latents joined.

    Args:
      text_BT: prompts, BOS first, padded on the right; length_B: their lengths, 0 for a row that asks for nothing.
      room: tokens that the caches have room for after T, at least max_new_tokens.
      every: latents are written at the end of the prompt, and where this is not 0 again whenever that many tokens have
        been decoded since they were last asked for.
      look: gets the new tokens [B, n], every CHUNK of them at least, and says which rows are to end, bool [B].
    """
    state, plain = prefill(params, text_BT, length_B, aug=aug, room=room, pad_id=pad_id)
    cache: Cache = plain.cache
    made = held = 0  # new tokens; those of them that were read as plain text
    due: int | None = 0
    joined: list[int] = []

    def read_on() -> Text:
        if made == held:
            return plain
        size = 1 << (made - held - 1).bit_length()
        return extend(params, plain, state.text, made - held, aug=aug, size=size)

    while made < max_new_tokens:
        if due is not None and made >= due and coprocessor.next_look(made) is None:
            plain, held = read_on(), made
            coprocessor.ask(plain, state.text, made)
            due = made + every if every else None
        if (z := coprocessor.answer(made)) is not None:
            plain, held = read_on(), made
            state, cache = join(params, state, plain.cache, z, aug=aug)
            joined.append(made)
        next_look = coprocessor.next_look(made)
        if due is None and next_look is None:
            plain = None  # nothing is to join any more
        elif cache is plain.cache:
            cache = jax.tree.map(jnp.copy, cache)  # decoding overwrites what it is given
        stops = [max_new_tokens, made + CHUNK, due and max(due, made + 1), next_look]
        until = min(stop for stop in stops if stop is not None)
        state, cache = decode(params, state, cache, sampling, until - made, aug=aug, eos_id=eos_id, pad_id=pad_id)
        made = until
        ended = np.asarray(state.ended) | look(np.asarray(_new_tokens(state.text, length_B, max_new_tokens))[:, :made])
        if ended.all():
            break
        state = state._replace(ended=jax.device_put(ended, state.ended.sharding))
    return np.asarray(_new_tokens(state.text, length_B, max_new_tokens)), tuple(joined)


@partial(jax.jit, static_argnums=2)
def _new_tokens(text_BX: jax.Array, length_B: jax.Array, count: int) -> jax.Array:
    return jnp.take_along_axis(text_BX, length_B[:, None] + jnp.arange(count), axis=1)


def sample(
    key_B: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """A token of each row, int32 [B]; see `Sampling`."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(temperature > 0, _draw, lambda *_: likeliest_B, key_B, logits_BV, temperature, top_k, top_p)


def _draw(key_B: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array):
    """Sorting a vocabulary costs more than reading a small decoder: only where something is drawn."""
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    sorted_BV = jnp.sort(jax.nn.softmax(scaled_BV), axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    among = (before_BV < top_p) & ((jnp.arange(sorted_BV.shape[-1]) < top_k) | (top_k == 0))
    least_B1 = jnp.min(jnp.where(among, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    kept_BV = jnp.where(jax.nn.softmax(scaled_BV) >= least_B1, scaled_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(key_B, kept_BV).astype(jnp.int32)


@partial(jax.jit, static_argnames=("aug", "room", "pad_id"))
def prefill(
    params: Params, text_BT: jax.Array, length_B: jax.Array, *, aug: Augmentation, room: int, pad_id: int
) -> tuple[Decoding, Text]:
    """Reads the prompts; there is room for `room` tokens more, and in the cache for latents."""
    table_VD = transformer.output_table(params["decoder"])
    segment_BT = (jnp.arange(text_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)
    out_BTD, cache = augment.read(aug, params, text_BT, segment_BT, table_VD.dtype)
    last_BD = jnp.take_along_axis(out_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    state = Decoding(
        text=jnp.pad(text_BT, [(0, 0), (0, room)], constant_values=pad_id),
        length=length_B,
        position=length_B,
        logits=transformer.unembed(table_VD, last_BD, aug.transformer.config),
        ended=length_B == 0,
    )
    capacity = [(0, 0), (0, room + aug.num_latents)]
    wide = [(0, 0), *capacity, (0, 0), (0, 0)]
    cache = Cache(jnp.pad(cache.k, wide), jnp.pad(cache.v, wide), jnp.pad(cache.position, capacity), length_B)
    return state, Text(jnp.pad(out_BTD, [*capacity, (0, 0)]), _place(aug, cache))


def _place(aug: Augmentation, cache: Cache) -> Cache:
    """Rows and heads of a cache lie where they are used."""
    constrain = aug.transformer.partition.constrain
    k, v = (constrain(x, cache_lib.AXES) for x in (cache.k, cache.v))
    return cache._replace(k=k, v=v)


@partial(jax.jit, static_argnames=("aug", "size"))
def extend(params: Params, read: Text, text_BX: jax.Array, new: jax.Array, *, aug: Augmentation, size: int) -> Text:
    """The plain decoder reads the next `new` tokens of every text, at most `size`, after those it has read."""
    table_VD, (outputs_BXD, cache) = params["decoder"]["embedding"], read
    index_BS = cache.length[:, None] + jnp.arange(size)  # of the tokens, and in plain text their positions
    tokens_BS = jnp.take_along_axis(text_BX, jnp.minimum(index_BS, text_BX.shape[1] - 1), axis=1)
    x_BSD = transformer.embed(table_VD, tokens_BS, aug.transformer.config)
    out_BMSD, kv = _read_on(params, x_BSD, index_BS, cache, aug)
    outputs_BXD = outputs_BXD.at[jnp.arange(len(text_BX))[:, None], index_BS].set(out_BMSD[:, 0], mode="drop")
    return Text(outputs_BXD, _place(aug, cache_lib.append(cache, kv, index_BS, jnp.full_like(cache.length, new))))


def _read_on(params: Params, x_BSD: jax.Array, position_BS: jax.Array, cache: Cache, aug: Augmentation):
    """The plain decoder over S more inputs, which see all the cache and each other causally."""
    zero = jnp.zeros_like(position_BS)[:, None]
    bounds = Bounds(zero, zero + cache.length[:, None, None], zero)
    decoder = {"params": params["decoder"]}
    return aug.transformer.apply(decoder, x_BSD[:, None], position_BS[:, None], bounds, cache)


def _trace(aug: Augmentation, text_BX: jax.Array, length_B: jax.Array) -> Traces:
    """One trace a row, at the last token of its text."""
    segment_BX = (jnp.arange(text_BX.shape[1]) < length_B[:, None]).astype(jnp.int32)
    return aug.lay_out(text_BX, segment_BX, length_B[:, None] - 1, num_ahead=1)


@partial(jax.jit, static_argnames=("aug",))
def latents(params: Params, read: Text, text_BX: jax.Array, *, aug: Augmentation) -> Latents:
    """Latents of one trace a row, after the text that was read; of `params`, the coprocessor's alone are used."""
    return augment.latents(aug, params, read, _trace(aug, text_BX, read.cache.length))


@partial(jax.jit, static_argnames=("aug",))
def join(params: Params, state: Decoding, plain: Cache, z: Latents, *, aug: Augmentation) -> tuple[Decoding, Cache]:
    """Latents follow the text so far, which `plain` holds: what to decode next, and the cache to decode with."""
    now = _trace(aug, state.text, state.length)
    reread = now.inputs.shape[2]  # the last token's entry gives way to latents and the token itself
    read = plain._replace(length=plain.length - reread)
    out_BMAD, kv = augment.decode(aug, params, z, read, now)
    cache = cache_lib.append(read, kv, now.position[:, 0], jnp.full_like(read.length, aug.num_latents + reread))
    table_VD = transformer.output_table(params["decoder"])
    state = state._replace(
        position=now.position[:, 0, -1] + 1,
        logits=transformer.unembed(table_VD, out_BMAD[:, 0, -1], aug.transformer.config),
    )
    return state, _place(aug, cache_lib.by_position(cache))  # latents may share positions with text before them


@partial(jax.jit, static_argnames=("aug", "eos_id", "pad_id"), donate_argnames="cache")
def decode(
    params: Params,
    state: Decoding,
    cache: Cache,
    sampling: Sampling,
    count: jax.Array,
    *,
    aug: Augmentation,
    eos_id: int,
    pad_id: int,
) -> tuple[Decoding, Cache]:
    """`count` tokens more in every row, fewer when all rows have ended. A row's draws depend on its own key and the
    number of tokens before, on no other row."""
    config, table_VD = aug.transformer.config, params["decoder"]["embedding"]
    row = jnp.arange(state.length.shape[0])
    goal = state.length[0] + count

    def one_token(carry: tuple[Decoding, Cache]) -> tuple[Decoding, Cache]:
        state, cache = carry
        key_B = jax.vmap(jax.random.fold_in)(sampling.key, state.length)
        token_B = sample(key_B, state.logits, sampling.temperature, sampling.top_k, sampling.top_p)
        token_B = jnp.where(state.ended, pad_id, token_B)
        x_BSD = transformer.embed(table_VD, token_B[:, None], config)
        out_BMSD, kv = _read_on(params, x_BSD, state.position[:, None], cache, aug)
        after = Decoding(
            text=state.text.at[row, state.length].set(token_B),
            length=state.length + 1,
            position=state.position + 1,
            logits=transformer.unembed(transformer.output_table(params["decoder"]), out_BMSD[:, 0, 0], config),
            ended=state.ended | (token_B == eos_id),
        )
        return after, cache_lib.append(cache, kv, state.position[:, None], jnp.ones_like(state.length))

    def goes_on(carry: tuple[Decoding, Cache]) -> jax.Array:
        return (carry[0].length[0] < goal) & ~jnp.all(carry[0].ended)

    return jax.lax.while_loop(goes_on, one_token, (state, cache))

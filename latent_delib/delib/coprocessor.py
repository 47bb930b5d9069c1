"""Coprocessors: models that read the decoder's cache and write latents (Section 2.1).

Coprocessors read the cache through soft tokens of their own. This module also writes latents
without a coprocessor: trained vectors, or trained keys and values, which read nothing.
The functions are those of a method's row (`delib.methods`), and get the settings as `aug`.

Latents are vectors z [B, M, L, D], which enter the decoder where token embeddings do and are not
scaled again; or they are keys and values for each decoder layer (`Inserted`). In every `write_...`
function, `params` is the dict of `delib.augment`.

Each decoder layer normalizes its inputs. So a latent with a smaller norm need not have a smaller
effect, and even a latent of zeros has an effect. To weaken latents until they have none, scale
their values (`Inserted`) or lower attention scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib.traces import Traces
from latent_delib.errors import UserError
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import rotary, transformer
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params, Transformer

if TYPE_CHECKING:
    from latent_delib.delib.augment import Augmentation

# Logical axes of a coprocessor's soft tokens, and of the keys and values of `init_cartridge`.
AXES = {"soft_tokens": (None, "embed")}
CARTRIDGE_AXES = {
    "keys": ("layers", None, "heads", None),
    "values": ("layers", None, "heads", None),
}


class Reading(NamedTuple):
    """Holds what the decoder computed from a text: all that a method may know of the text.

    outputs: final-normed outputs [B, T, D]; None where only the caches were asked for.
    cache: the decoder's cache.
    assistant: the cache of the assistant (another decoder) of the same text, where the method has
      an assistant.
    """

    outputs: jax.Array | None
    cache: Cache
    assistant: Cache | None = None


class Inserted(NamedTuple):
    """Holds latents as keys, already rotated, and values: [B, M, layers, L, K, H] each."""

    k: jax.Array
    v: jax.Array


Latents = jax.Array | Inserted


# How the trees start: (key, decoder, aug) -> the coprocessor's tree.


def soft_tokens(key: jax.Array, embedding_VD: jax.Array, num_latents: int) -> jax.Array:
    """Draws N_L distinct starting vectors [L, D], float32: random rows of the token table.

    Raises:
      UserError: the table has fewer than N_L rows.
    """
    size = embedding_VD.shape[0]
    if num_latents > size:
        raise UserError(
            f"num_latents={num_latents}: expected at most {size}, the rows of the token table"
        )
    rows = jax.random.choice(key, size, (num_latents,), replace=False)
    return embedding_VD[rows].astype(jnp.float32)


def body(decoder: Params) -> Params:
    """Returns a decoder's `transformer.BODY`: all of its parameters but the token tables."""
    return {name: decoder[name] for name in transformer.BODY if name in decoder}


def init_from_decoder(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from the decoder's own layers.

    The tree has no token table, because a coprocessor never reads a token.
    """
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), body(decoder))
    return tree | init_soft_tokens(key, decoder, aug)


def init_from_scratch(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from random layers of the decoder's shape."""
    body_key, soft_key = jax.random.split(key)
    tree = body(transformer.init(body_key, aug.decoder.config))
    return tree | init_soft_tokens(soft_key, decoder, aug)


def init_soft_tokens(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from N_L vectors and no layers."""
    return {"soft_tokens": soft_tokens(key, decoder["embedding"], aug.num_latents)}


def init_one_soft_token(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from one vector for all latents, and no layers."""
    del aug
    return {"soft_tokens": soft_tokens(key, decoder["embedding"], 1)}


def init_cartridge(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from keys, not rotated, and values of every layer, [layers, L, K, H] each.

    The decoder computes them from N_L random tokens at position 0, where nothing is rotated.
    """
    config = aug.decoder.config
    soft_LD = soft_tokens(key, decoder["embedding"], aug.num_latents)
    x_BMLD = transformer.scaled(soft_LD.astype(decoder["embedding"].dtype), config)[None, None]
    position_BML = jnp.zeros((1, 1, aug.num_latents), jnp.int32)
    bounds = transformer.own_text(position_BML[0])
    _, kv = Transformer(config).apply({"params": decoder}, x_BMLD, position_BML, bounds)
    return {"keys": kv.k[:, 0, 0], "values": kv.v[:, 0, 0]}


# How latents are written: (aug, params, reading, traces) -> latents.


def soft_tokens_per_trace(
    params: Params, model: Transformer, traces: Traces, dtype: jnp.dtype
) -> jax.Array:
    """Returns the soft tokens for every trace, [B, M, L, D] in `dtype`.

    Soft tokens are repeated until there are L of them: one soft token L times, and a group as often
    as it recurs.
    """
    L = traces.latent_position.shape[-1]
    soft_LD = params["coprocessor"]["soft_tokens"].astype(dtype)
    soft_LD = model.partition.gather(soft_LD, AXES["soft_tokens"])
    soft_LD = jnp.tile(soft_LD.astype(jnp.float32), (L // len(soft_LD), 1))
    return per_trace(soft_LD, traces).astype(dtype)


def per_trace(x: jax.Array, traces: Traces) -> jax.Array:
    """Repeats a weight for every trace, float32 [B, M, *x.shape].

    Float32, because a weight's gradient is a sum over all traces: in bfloat16, a sum of thousands
    of addends would lose most of them.
    """
    B, M, _ = traces.latent_position.shape
    return jnp.broadcast_to(x.astype(jnp.float32), (B, M, *x.shape))


def write_soft_tokens(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Returns the soft tokens themselves, whatever the text.

    They are scaled like rows of the token table. Unscaled, they would enter a Gemma decoder sqrt(D)
    times shorter than its tokens do.
    """
    soft_BMLD = soft_tokens_per_trace(params, aug.decoder, traces, reading.cache.k.dtype)
    return transformer.scaled(soft_BMLD, aug.decoder.config)


def write_cartridge(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> Inserted:
    """Returns trained keys and values for each layer, whatever the text (Eyuboglu et al. 2025).

    Keys are rotated to the latents' positions.
    """
    config = aug.decoder.config
    dtype = reading.cache.k.dtype
    own = {name: params["coprocessor"][name].astype(dtype) for name in CARTRIDGE_AXES}
    k = per_trace(own["keys"], traces).astype(dtype)  # [B, M, layers, L, K, H]
    v = per_trace(own["values"], traces).astype(dtype)
    k = jnp.moveaxis(k, 2, 0)
    k = rotated(k, traces.latent_position, config, range(config.num_layers))
    return Inserted(jnp.moveaxis(k, 0, 2), v)


def write_in_one_pass(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes latents z [B, M, L, D] of every trace, in one forward pass.

    In layer l the soft tokens see the decoder's keys and values of layer l up to x_p, and each
    other causally. The final-normed outputs are the latents.
    """
    z_BMLD, _ = _one_pass(aug, params, reading.cache, traces)
    return z_BMLD


def write_keys_and_values(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> Inserted:
    """Writes the keys and values of one pass instead of its outputs.

    The pass is that of `write_in_one_pass`. The keys and values of layer l enter the decoder's
    layer l. This is hypothesis 1 of Coda-Forno et al. 2025.
    """
    _, kv = _one_pass(aug, params, reading.cache, traces)
    return Inserted(jnp.moveaxis(kv.k, 0, 2), jnp.moveaxis(kv.v, 0, 2))


def write_from_last_layer(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes latents with a coprocessor that reads the decoder's outputs, not its cache."""
    position_BT = reading.cache.position
    bounds = transformer.own_text(jnp.arange(position_BT.shape[1]) - position_BT)
    weights = {"params": params["coprocessor"]}
    x_BMTD = reading.outputs[:, None]
    _, kv = aug.models.coprocessor.apply(weights, x_BMTD, position_BT[:, None], bounds)
    own_cache = cache_lib.of_text(kv, position_BT)
    z_BMLD, _ = _one_pass(aug, params, own_cache, traces)
    return z_BMLD


def write_one_after_another(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes latents one at a time, and adds each latent to the soft token of the next.

    This takes one pass per latent, each over one token.
    """
    soft_BMLD = soft_tokens_per_trace(params, aug.models.coprocessor, traces, reading.cache.k.dtype)
    return _fed_back(aug, params, reading, traces, soft_BMLD)


def write_feedback(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes a trained token, then the model's outputs, each fed back as the next input.

    The outputs are the continuous thoughts of Hao et al. 2024; the trained token begins them.
    Latent i + 1 is the output at latent i, so there are N_L - 1 thoughts.
    """
    soft_BMLD = write_soft_tokens(aug, params, reading, traces)
    is_first_L1 = jnp.arange(soft_BMLD.shape[2])[:, None] == 0
    inputs_BMLD = jnp.where(is_first_L1, soft_BMLD, 0)
    thoughts = _fed_back(aug, params, reading, traces, inputs_BMLD[:, :, :-1])
    return jnp.concatenate([soft_BMLD[:, :, :1], thoughts], axis=2)


def _fed_back(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
    x_BMLD: jax.Array,
) -> jax.Array:
    """Runs the model one token at a time, adding each output to the next input.

    Returns the outputs.
    """
    model = aug.models.coprocessor
    c = model.config
    B, M, L, D = x_BMLD.shape
    if L == 0:  # one latent of `write_feedback`: the token that begins thoughts
        return x_BMLD
    position_BML = traces.latent_position[:, :, :L]
    weights = {"params": params["coprocessor"]}

    def one(carry: tuple[jax.Array, KV], i: jax.Array) -> tuple[tuple[jax.Array, KV], jax.Array]:
        z_BMD, earlier = carry
        x_BMD = jnp.take(x_BMLD, i, axis=2) + z_BMD
        # There are L places at every step. Tokens 0 ... i take the last i + 1 of them. The places
        # before them are hidden, so their positions do not matter.
        unused = L - 1 - i
        places_BML = jnp.roll(position_BML, unused, axis=2)
        bounds = jax.tree.map(lambda x: jnp.take(x, i, axis=2)[..., None], traces.latent_bounds)
        bounds = bounds._replace(own_start=bounds.own_start + unused)
        cache = reading.cache
        z_BM1D, kv = model.apply(weights, x_BMD[:, :, None], places_BML, bounds, cache, earlier)
        z_BMD = z_BM1D[:, :, 0]
        return (z_BMD, jax.tree.map(lambda x: x[:, :, :, 1:], kv)), z_BMD

    # Each step keeps the keys and values of all L places for its gradient. With remat "full" only
    # the first of every `together` steps keeps them, and the other steps are computed again.
    together = L
    steps = partial(jax.lax.scan, one)
    if model.remat == "full":
        divisors = [n for n in range(1, L + 1) if L % n == 0]
        together = max(n for n in divisors if n * n <= L)  # at most the square root of L
        steps = jax.checkpoint(steps, prevent_cse=False)
    none = jnp.zeros((c.num_layers, B, M, L - 1, c.num_kv_heads, c.head_dim), x_BMLD.dtype)
    start = jnp.zeros((B, M, D), x_BMLD.dtype), KV(none, none)
    _, z = jax.lax.scan(steps, start, jnp.arange(L).reshape(-1, together))
    return jnp.moveaxis(z.reshape(L, B, M, D), 0, 2)


def _one_pass(
    aug: Augmentation,
    params: Params,
    cache: Cache,
    traces: Traces,
) -> tuple[jax.Array, KV]:
    """Runs a coprocessor once on its soft tokens, which attend to a cache.

    Returns final-normed outputs [B, M, L, D], and keys and values.
    """
    model = aug.models.coprocessor
    x_BMLD = soft_tokens_per_trace(params, model, traces, cache.k.dtype)
    weights = {"params": params["coprocessor"]}
    return model.apply(weights, x_BMLD, traces.latent_position, traces.latent_bounds, cache)


def rotated(
    k: jax.Array,
    position: jax.Array,
    config: TransformerConfig,
    layers: Sequence[int],
) -> jax.Array:
    """Rotates keys [len(layers), ..., K, H] as each of these layers does at positions [...].

    Negated positions rotate back.
    """
    if config.learned_positions:
        return k
    kinds = np.array(config.is_local, int)[np.asarray(layers)]
    return jax.vmap(rotary.rotate)(k, rotary.tables(config, position)[kinds])

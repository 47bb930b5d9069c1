"""Inspects latents: what they attend to, what attends to them, and the words nearest to them.

In each function `lm` is an AugmentedLM. The fast paths never hold attention weights; the
transformer computes them where "intermediates" is a mutable collection (`nn.layers.Attention`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import arguments
from latent_delib.nn.cache import Cache
from latent_delib.nn.products import einsum
from latent_delib.nn.transformer import Params, Transformer


class AttentionMap(NamedTuple):
    """Holds the attention weights of one call.

    weights: float32 [layers, N, S, T + U]; each row adds up to 1.
    rows: names of the S tokens of the call.
    columns: names of the T text tokens in the cache, then of U more: the S tokens and, before them,
      latents that are keys and values, where there are any.
    text: T.
    """

    weights: np.ndarray
    rows: list[str]
    columns: list[str]
    text: int


class Near(NamedTuple):
    """Holds a word of the vocabulary, and the cosine between a latent and its embedding."""

    word: str
    cosine: float


class Watched:
    """Replaces a transformer in the calls of `delib.augment`, and records attention weights.

    Each call adds its weights to `seen`: [layers, B, M, K, G, S, T + U]. Calls inside a loop add
    nothing, because their weights do not leave the loop.
    """

    def __init__(self, transformer: Transformer, seen: list[jax.Array]):
        self.transformer = transformer
        self.seen = seen
        self.trace = current_trace()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def apply(self, variables: Params, *args: Any, **options: Any) -> Any:
        out, kept = self.transformer.apply(variables, *args, mutable="intermediates", **options)
        if current_trace() == self.trace:
            self.seen += kept["intermediates"]["layers"]["attn"]["weights"]
        return out


def cache(lm: AugmentedLM, tokens_BT: Any) -> Cache:
    """Returns the cache that the decoder keeps of texts.

    Keys and values are [layers, B, T, K, H] each.

    Args:
      tokens_BT: one text per row, BOS first.

    Raises:
      UserError: the tokens are not integers [B, T] of the vocabulary.
    """
    tokens = lm.token_array(tokens_BT)
    return _read(lm.params, tokens, aug=lm.plain)


@partial(jax.jit, static_argnames=("aug",))
def _read(params: Params, tokens_BT: jax.Array, *, aug: Augmentation) -> Cache:
    return augment.read_text(aug, params, tokens_BT, jnp.ones_like(tokens_BT)).cache


def attention(
    lm: AugmentedLM,
    tokens: Sequence[int],
    at: int,
) -> tuple[AttentionMap | None, AttentionMap]:
    """Returns the attention of latents after token `at` of a text, and of the text after them.

    Args:
      tokens: the text, BOS first. Tokens after `at`, at least two, are the ahead tokens; they are
        read as in training.

    Returns:
      Two maps. The first is that of the coprocessor's call, with a row for each of the L latents;
      None where a method has no coprocessor, or calls it in a loop. The second is that of the
      decoder's call, with a row for each latent and each token after the latents, or for each token
      alone where latents are keys and values. Columns are the text up to `at`, then the latents,
      then, in the second map, the tokens.

    Raises:
      UserError: the model writes no latents; `tokens` are not integers of the vocabulary; `at` is
        out of range.
    """
    if not lm.aug.writes_latents:
        raise UserError("this model has no coprocessor, so no latents")
    text = lm.token_array([tokens])
    if len(tokens) < 3:
        raise UserError(f"tokens: holds {len(tokens)}, expected at least 3")
    at = arguments.whole("at", at, -arguments.INT32)
    if not 0 <= at < len(tokens) - 2:
        raise UserError(
            f"at={at}: expected 0 to {len(tokens) - 3}, two tokens before the end of the text"
        )
    ahead = len(tokens) - 1 - at
    called = _called(lm.params, text, jnp.array([[at]]), aug=lm.aug, ahead=ahead)
    *written, decoded = (_weights(w, at, len(tokens)) for w in called)
    names = [f"{i} {word}" for i, word in enumerate(words(lm, tokens))]
    cached = names[: at + 1]
    latents = [f"z{i + 1}" for i in range(lm.aug.count_latents(ahead))]
    reread = PLACEMENTS[lm.aug.placement].reread
    own = latents + names[at + 1 - reread : -1]
    own = [own[i] for i in lm.aug.reading_order(ahead)]
    of_decoder = AttentionMap(decoded, own[-decoded.shape[2] :], cached + own, at + 1)
    if not written:
        return None, of_decoder
    return AttentionMap(written[0], latents, cached + latents, at + 1), of_decoder


def _weights(w: jax.Array, at: int, length: int) -> np.ndarray:
    """Returns the weights of one trace, [layers, N, S, at + 1 + U].

    Columns of the cache after `at` are left out, because no row attends to them.
    """
    w = np.asarray(w[:, 0, 0], np.float32)
    w = np.concatenate([w[..., : at + 1], w[..., length:]], axis=-1)
    layers, K, G, S, U = w.shape
    return w.reshape(layers, K * G, S, U)


@partial(jax.jit, static_argnames=("aug", "ahead"))
def _called(
    params: Params,
    text_BT: jax.Array,
    at_BM: jax.Array,
    *,
    aug: Augmentation,
    ahead: int,
) -> list[jax.Array]:
    """Returns attention weights of the coprocessor's call, if any, and of the decoder's."""
    segment_BT = jnp.ones_like(text_BT)
    reading = augment.read_text(aug, params, text_BT, segment_BT)
    seen: list[jax.Array] = []  # in the calls after this one
    decoder, coprocessor = (Watched(model, seen) for model in aug.models)
    aug = dataclasses.replace(aug, decoder=decoder, coprocessor=coprocessor)
    traces = aug.lay_out(text_BT, segment_BT, at_BM, ahead)
    z = augment.write_latents(aug, params, reading, traces)
    augment.decode(aug, params, z, reading.cache, traces)
    return seen[-2:]  # of the last call that writes latents, if any, and of the one that decodes


def nearest(lm: AugmentedLM, z_LD: jax.Array, count: int = 5) -> list[list[Near]]:
    """Finds the `count` words whose embeddings have the highest cosine with each latent.

    The best come first. Embeddings are the right comparison, because the decoder reads latents
    where it reads embeddings. Logits would not do: they also grow with the norm of a word's
    embedding, which depends on the word's frequency.

    Raises:
      UserError: `count` is out of range, or latents have another shape.
    """
    count = arguments.whole("count", count, 1, lm.decoder.config.vocab_size)
    D = lm.decoder.config.embed_dim
    if np.ndim(z_LD) != 2 or np.shape(z_LD)[1] != D:
        raise UserError(
            f"z: of shape {np.shape(z_LD)}, expected the latents of one position, [L, {D}]"
        )
    table_VD = jnp.asarray(lm.params["decoder"]["embedding"], jnp.float32)
    cosine_LV = einsum("LD,VD->LV", _unit(jnp.asarray(z_LD, jnp.float32)), _unit(table_VD))
    found = []
    for values, tokens in zip(*jax.lax.top_k(cosine_LV, count)):
        near = zip(words(lm, tokens.tolist()), values.tolist())
        found.append([Near(word, cosine) for word, cosine in near])
    return found


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def words(lm: AugmentedLM, tokens: Sequence[int]) -> list[str]:
    """Returns the text of each token by itself, or its number where that text is blank."""
    found = []
    for token in map(int, tokens):
        text = lm.tokenizer.decode([token])
        found.append(text if text.strip() else f"<{token}>")
    return found

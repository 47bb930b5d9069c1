"""Holds the published form, to compare with: one sequence, a dense mask (Liu et al., Figure 2).

The decoder reads [text, latents and ahead tokens of every trace] as one sequence of T + M S tokens,
the coprocessor all soft tokens after the text's cache, and a mask over all pairs says who sees
whom. Parameters, layers' parts and the loss of the outputs are the package's; what differs is
attention. Plain autodiff; a layer's input is kept, the rest computed again.

Letters: here S counts the queries of the whole sequence, U its keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.traces import document_start
from latent_delib.nn import rotary, transformer
from latent_delib.nn.layers import MLP, RMSNorm
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params


class Tokens(NamedTuple):
    """Holds what visibility and rotation depend on, int32 [B, S] each.

    position: rotary. document: index of its document's first token. trace: 0 for text, else 1 + m.
    order: place in the text or in the trace. last: the last text token that it sees.
    """

    position: jax.Array
    document: jax.Array
    trace: jax.Array
    order: jax.Array
    last: jax.Array


def of_text(segment_BT: jax.Array) -> Tokens:
    start_BT = document_start(segment_BT)
    index_BT = jnp.broadcast_to(jnp.arange(segment_BT.shape[1]), segment_BT.shape)
    return Tokens(index_BT - start_BT, start_BT, jnp.zeros_like(index_BT), index_BT, index_BT)


def of_traces(position_BMS: jax.Array, start_BMS: jax.Array, stop_BMS: jax.Array) -> Tokens:
    """Lays traces one after the other; a token of one sees text tokens start <= t < stop."""
    _, M, S = position_BMS.shape
    trace_M1, order_S = 1 + jnp.arange(M)[:, None], jnp.arange(S)
    parts = (position_BMS, start_BMS, trace_M1, order_S, stop_BMS - 1)
    return Tokens(*(jnp.broadcast_to(x, position_BMS.shape).reshape(-1, M * S) for x in parts))


def both(text: Tokens, traces: Tokens) -> Tokens:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), text, traces)


def visible(query: Tokens, key: Tokens) -> jax.Array:
    """Returns the mask of Figure 2, bool [B, S, U]."""
    q, k = jax.tree.map(lambda x: x[:, :, None], query), jax.tree.map(lambda x: x[:, None, :], key)
    text = (k.trace == 0) & (k.document == q.document) & (k.order <= q.last)
    own = (k.trace > 0) & (k.trace == q.trace) & (k.order <= q.order)
    return text | own


def attend(
    q_BSNH: jax.Array,
    k_BUKH: jax.Array,
    v_BUKH: jax.Array,
    visible_BSU: jax.Array,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Returns attention of all queries to all keys, [B, S, N, H]; scores are float32."""
    B, S, N, H = q_BSNH.shape
    K = k_BUKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    scores = jnp.einsum("BSKGH,BUKH->BKGSU", q_BSKGH, k_BUKH, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(visible_BSU[:, None, None], scores, -jnp.inf))
    out = jnp.einsum("BKGSU,BUKH->BSKGH", weights.astype(v_BUKH.dtype), v_BUKH)
    return out.reshape(B, S, N, H)


def forward(
    c: TransformerConfig,
    params: Params,
    x_BSD: jax.Array,
    query: Tokens,
    key: Tokens,
    cache: tuple | None = None,
) -> tuple[jax.Array, tuple]:
    """Returns final-normed outputs [B, S, D], and own keys and values [layers, B, S, K, H].

    cache: the keys and values of the tokens that stand before.
    """
    seen_BSU = visible(query, key)
    near_BSU = query.position[:, :, None] - key.position[:, None, :] < c.window
    ropes = rotary.tables(c, query.position)

    def norm(scale: Params, x: jax.Array) -> jax.Array:
        return RMSNorm(c.norm_eps, c.norm_offset).apply({"params": scale}, x)

    def layer(x_BSD: jax.Array, this: tuple):
        p, is_local, before = this
        heads, normed_BSD = {}, norm(p["pre_attn_norm"], x_BSD)
        for name in ("q", "k", "v"):
            y = jnp.einsum("BSD,DNH->BSNH", normed_BSD, p["attn"][name].astype(x_BSD.dtype))
            if c.qkv_bias:
                y += p["attn"][f"{name}_bias"].astype(y.dtype)
            if c.qk_norm and name != "v":
                y = norm(p["attn"][f"{name}_norm"], y)
            heads[name] = y if name == "v" else rotary.rotate(y, ropes[is_local])
        own = keys = (heads["k"], heads["v"])
        if before is not None:
            keys = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), before, own)
        mask_BSU = seen_BSU & (near_BSU | (is_local == 0))
        out_BSNH = attend(heads["q"], *keys, mask_BSU, c.query_scale, c.attn_softcap)
        y = jnp.einsum("BSNH,NHD->BSD", out_BSNH, p["attn"]["out"].astype(x_BSD.dtype))
        x_BSD += norm(p["post_attn_norm"], y) if c.post_norms else y
        y = MLP(c).apply({"params": p["mlp"]}, norm(p["pre_mlp_norm"], x_BSD))
        x_BSD += norm(p["post_mlp_norm"], y) if c.post_norms else y
        return x_BSD, own

    over = (params["layers"], jnp.array(c.is_local, jnp.int32), cache)
    x_BSD, kv = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x_BSD, over)
    return norm(params["final_norm"], x_BSD), kv


def loss(
    aug: Augmentation,
    params: Params,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    num_ahead: int,
    delay_BM: jax.Array | int = 0,
    prompt_end: Sequence[int] = (),
    steps_end: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array]:
    """Computes what `augment.loss` does for a coprocessor: Σ loss in nats and Σ tokens."""
    del prompt_end  # `at_BM` is behind prompts already
    c, (B, T), M = aug.decoder.config, tokens_BT.shape, at_BM.shape[1]
    decoder, coprocessor = params["decoder"], params["coprocessor"]
    traces = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead, delay_BM, steps_end)
    text = of_text(segment_BT)
    soft = of_traces(traces.latent_position, *traces.latent_bounds[:2])
    whole = both(text, of_traces(traces.position, *traces.bounds[:2]))

    def embed(tokens: jax.Array) -> jax.Array:
        return transformer.embed(decoder["embedding"], tokens, c)

    _, cache = forward(c, decoder, embed(tokens_BT), text, text)
    soft_BSD = jnp.tile(coprocessor["soft_tokens"], (B, M, 1))
    z_BSD, _ = forward(c, coprocessor, soft_BSD, soft, both(text, soft), cache)
    x_BMSD = jnp.concatenate([z_BSD.reshape(B, M, -1, c.embed_dim), embed(traces.inputs)], axis=2)
    x_BSD = jnp.concatenate([embed(tokens_BT), x_BMSD.reshape(B, -1, c.embed_dim)], axis=1)
    out_BSD, _ = forward(c, decoder, x_BSD, whole, whole)
    out_BMSD = out_BSD[:, T:].reshape(x_BMSD.shape)
    total = augment.training_loss(
        aug, params, out_BMSD[:, :, -num_ahead:], traces.targets, traces.weights
    )
    return total, jnp.sum(traces.weights)

"""Attention weights: right where they are asked for, and otherwise never computed."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import small

from latent_delib.nn import cache, layers, transformer
from latent_delib.nn.attention import primitive
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.transformer import Transformer

T, S = 11, 4  # text in the cache, of which all but the last two are seen; tokens of a trace


@pytest.fixture(scope="module", params=["gemma", "llama"])
def called(request):
    """A model and the arguments of a call over a cache: (config, params, arguments)."""
    config = small.CONFIGS[request.param]
    params = jax.tree.map(jnp.asarray, small.decoder(config))

    @jax.jit
    def arguments(params):
        x = transformer.embed(params["embedding"], jnp.arange(T + S)[None], config)[:, None]
        position = jnp.arange(T)[None]
        text = transformer.own_text(position * 0)
        _, kv = Transformer(config).apply({"params": params}, x[:, :, :T], position[:, None], text)
        own = jnp.arange(T - 2, T - 2 + S)[None, None]
        bounds = Bounds(own * 0 + 1, own * 0 + T - 2, own * 0)
        return x[:, :, T:], own, bounds, cache.of_text(kv, position)

    return config, params, arguments(params)


def test_rows_add_up_and_nothing_invisible_is_seen(called):
    config, params, arguments = called

    @jax.jit
    def both(params):
        watched = Transformer(config).apply({"params": params}, *arguments, mutable="intermediates")
        return watched, Transformer(config).apply({"params": params}, *arguments)

    ((out, _), kept), (plain, _) = both(params)
    (weights,) = kept["intermediates"]["layers"]["attn"]["weights"]
    K = config.num_kv_heads
    assert (
        weights.shape == (config.num_layers, 1, 1, K, config.num_heads // K, S, T + S)
        and weights.dtype == jnp.float32
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    slot, own = np.arange(T), np.arange(S)
    for l, is_local in enumerate(config.is_local):
        back = (T - 2 + own[:, None]) - np.concatenate([slot, T - 2 + own])
        visible = np.concatenate(
            [np.tile((slot >= 1) & (slot < T - 2), (S, 1)), np.tri(S, dtype=bool)], axis=1
        )
        visible &= back < (config.window if is_local else T + S)
        np.testing.assert_array_equal(
            np.asarray(weights[l]) > 0, np.broadcast_to(visible, weights[l].shape)
        )
    np.testing.assert_allclose(out, plain, rtol=1e-6)


def test_weights_times_values_is_the_attention_of_the_naive_reading():
    """A single layer, text alone: the naive attention of that layer's own queries and values."""
    config = dataclasses.replace(small.GEMMA, num_layers=1, layer_pattern=("global",))
    rng = np.random.default_rng(0)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (rng.normal(size=(1, 1, S, heads, H)).astype(np.float32) for heads in (N, K, K))
    bounds = transformer.own_text(jnp.zeros((1, S), jnp.int32))
    how = dict(scale=config.query_scale, softcap=config.attn_softcap)
    weights = primitive.weights(jnp.asarray(q), jnp.asarray(k), None, bounds, **how)
    ours = np.einsum("kgsu,ukh->skgh", weights[0, 0], v[0, 0]).reshape(S, N, H)
    wanted = naive.attention(config, q[0, 0], k[0, 0], v[0, 0], np.tri(S, dtype=bool))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_no_other_call_computes_them(called, monkeypatch):
    """Without the function that computes them, every call but the one that asks is as before."""
    config, params, arguments = called
    monkeypatch.setattr(layers, "primitive", None)

    def call(**how):
        return jax.eval_shape(
            lambda p: Transformer(config).apply({"params": p}, *arguments, **how), params
        )

    call(), call(mutable=["params"])
    with pytest.raises(AttributeError, match="weights"):
        call(mutable="intermediates")

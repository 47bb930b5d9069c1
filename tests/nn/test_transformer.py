"""The transformer against the naive reading, with and without its cache, and in bfloat16."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import small

from latent_delib.errors import UserError
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import layers, rotary, sizes, transformer
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.layers import RMSNorm, biased
from latent_delib.nn.sizes import ADDED_LATER, SIZES, TransformerConfig
from latent_delib.nn.transformer import Transformer

T = 14  # nearly three windows
TOKENS = np.random.default_rng(0).integers(0, 97, (2, T))
DOCUMENT = np.array([[0] * 5 + [1] * 9, [0] * T])
START = np.array([[0] * 5 + [5] * 9, [0] * T])


@pytest.fixture(scope="module", params=["gemma", "llama", "gpt2"])
def model(request):
    config = small.CONFIGS[request.param]
    return config, small.decoder(config)


@partial(jax.jit, static_argnums=0)
def read(config, params, tokens, start):
    """Outputs [B, T, D] of packed text, and its keys and values."""
    x = transformer.embed(params["embedding"], tokens, config)
    position = jnp.arange(tokens.shape[1]) - start
    bounds = transformer.own_text(start)
    out, kv = Transformer(config).apply({"params": params}, x[:, None], position[:, None], bounds)
    return out[:, 0], kv


def test_logits_equal_the_naive_reading(model):
    config, params = model
    x, _ = read(config, params, TOKENS, START)
    ours = transformer.unembed(transformer.output_table(params), x, config)
    assert ours.dtype == jnp.float32
    for row in range(2):
        expected = naive.logits(
            config, params, naive.text_outputs(config, params, TOKENS[row], DOCUMENT[row])
        )
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-5)


def test_keys_and_values_alone_are_the_same_and_cost_less(model):
    """The last layer computes nothing else. float32, to the order of sums."""
    config, params = model

    def only_cache(params):
        x = transformer.embed(params["embedding"], TOKENS, config)[:, None]
        position = (jnp.arange(T) - START)[:, None]
        inputs = x, position, transformer.own_text(START)
        return Transformer(config).apply({"params": params}, *inputs, outputs=False)

    compiled = jax.jit(only_cache).lower(params).compile()
    outputs, kv = compiled(params)
    _, expected = read(config, params, TOKENS, START)
    assert outputs is None
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), kv, expected)
    # XLA counts the body of a loop once, however often it runs: here once, and the keys and values.
    whole = jax.jit(lambda params: read(config, params, TOKENS, START)).lower(params).compile()
    flops = [step.cost_analysis()["flops"] for step in (compiled, whole)]
    assert flops[0] < 1.5 * flops[1]


def test_cached_equals_uncached_at_every_split(model):
    """Rows are read in two parts, cut at every s and T - s; then in many unequal pieces."""
    config, params = model
    start = np.zeros_like(START)
    full, full_kv = read(config, params, TOKENS, start)

    @jax.jit
    def extend(params, cache, tokens_BT, count_B):
        x = transformer.embed(params["embedding"], tokens_BT, config)
        position = (cache.length[:, None] + jnp.arange(T))[:, None]
        zero = jnp.zeros_like(position)
        bounds = Bounds(zero, zero + cache.length[:, None, None], zero)
        out, kv = Transformer(config).apply({"params": params}, x[:, None], position, bounds, cache)
        return out[:, 0], cache_lib.append(cache, kv, position[:, 0], count_B)

    splits = [([s, T - s], [T - s, s]) for s in range(T + 1)]
    for pieces in [*splits, ([1, 4, 0, 2, 7], [6, 1, 1, 5, 1])]:
        cache = small.empty_cache(config, 2, T, jnp.float32)
        for count in np.transpose(pieces):
            done = np.array(cache.length)
            # What stands past a row's count is somebody's padding: it must not matter.
            index = done[:, None] + np.arange(T)
            tokens = np.where(index < (done + count)[:, None], TOKENS[[[0], [1]], index % T], 96)
            out, cache = extend(params, cache, tokens, count)
            for row, (d, n) in enumerate(zip(done, count)):
                np.testing.assert_allclose(
                    out[row, :n], full[row, d : d + n], rtol=1e-5, atol=1e-5, err_msg=f"{pieces}"
                )
        assert cache.length.tolist() == [T, T]
        np.testing.assert_array_equal(cache.position, np.arange(T) - start)
        for cached, own in zip(cache[:2], full_kv):
            np.testing.assert_allclose(cached, own[:, :, 0], rtol=1e-5, atol=1e-5)


def test_a_group_is_read_on_from_its_keys_and_values(model):
    """The later tokens of a group, of whose earlier ones keys and values are there already."""
    config, params = model
    cut = T // 2
    full, kv = read(config, params, TOKENS, START)
    bounds = transformer.own_text(jnp.asarray(START))
    bounds = jax.tree.map(lambda x: x[:, :, cut:], bounds)
    x = transformer.embed(params["embedding"], TOKENS[:, cut:], config)[:, None]
    given = jax.tree.map(lambda x: x[:, :, :, :cut], kv)
    position = (np.arange(T) - START)[:, None]
    out, own = Transformer(config).apply({"params": params}, x, position, bounds, None, given)
    np.testing.assert_allclose(out[:, 0], full[:, cut:], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), own, kv)


def test_bfloat16_stays_near_float32(model):
    """The same rounded weights in both: four layers of bfloat16 products, and nothing worse."""
    config, params = model
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    (x16, kv16), (x32, _) = read(config, half, TOKENS, START), read(config, whole, TOKENS, START)
    assert x16.dtype == kv16.k.dtype == kv16.v.dtype == jnp.bfloat16
    error = np.asarray(x16.astype(jnp.float32) - x32)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(np.square(x32)))
    assert transformer.unembed(transformer.output_table(half), x16, config).dtype == jnp.float32


def test_norm_is_float32_inside():
    """The float64 result with at most one rounding to bfloat16, for inputs up to 1e4."""
    x = (10.0 ** jax.random.uniform(jax.random.key(0), (7, 600), minval=-2, maxval=4)).astype(
        jnp.bfloat16
    )
    scale = jax.random.normal(jax.random.key(1), (600,)).astype(jnp.bfloat16)
    ours = RMSNorm(1e-6, 1.0).apply({"params": {"scale": scale}}, x)
    expected = naive.rms_norm(
        *(np.asarray(a.astype(jnp.float32), np.float64) for a in (x, scale)), 1e-6
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8 + 1e-5)


def test_gradients_of_biases_are_summed_in_float32():
    """16,384 addends of nearly one sign: a sum that keeps 8 bits stops at 256."""
    y_BMSD = jnp.ones((16, 64, 16, 3), jnp.bfloat16)
    bias_D = jnp.array([0.1, 2.0, -3.0], jnp.bfloat16)
    out, back = jax.vjp(partial(biased, y_BMSD), bias_D)
    np.testing.assert_array_equal(out, y_BMSD + bias_D, strict=True)
    noise = np.random.default_rng(0).normal(1.0, 0.1, y_BMSD.shape)
    cotangent = jnp.asarray(noise, jnp.bfloat16)
    (found,) = jax.jit(back)(cotangent)
    expected = np.asarray(cotangent, np.float64).sum(axis=(0, 1, 2))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


def test_gradients_of_a_token_table_are_summed_in_float32():
    """4,096 addends of nearly one sign for one row: a sum that keeps 8 bits stops at 256."""
    table_VD = jnp.ones((5, 3), jnp.bfloat16)
    index = jnp.full((4, 1024), 2)
    out, back = jax.vjp(lambda table: transformer.look_up(table, index), table_VD)
    noise = np.random.default_rng(0).normal(1.0, 0.1, out.shape)
    cotangent = jnp.asarray(noise, jnp.bfloat16)
    (found,) = jax.jit(back)(cotangent)
    expected = np.zeros((5, 3))
    expected[2] = np.asarray(cotangent, np.float64).sum(axis=(0, 1))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


def test_rotary_is_float32_inside_far_into_the_text():
    position = np.array([[[0, 1, 4097, 100_003]]])
    x = jax.random.normal(jax.random.key(0), (1, 1, 4, 2, 16)).astype(jnp.bfloat16)
    ours = rotary.rotate(x, rotary.table(jnp.array(position), 16, 1e4))
    expected = naive.rotate(
        np.asarray(x[0, 0].astype(jnp.float32), np.float64), position[0, 0], 1e4
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[0, 0].astype(jnp.float32), expected, rtol=2**-8, atol=2**-8)


def test_every_activation_is_computed():
    assert tuple(layers.ACTIVATIONS) == sizes.ACTIVATIONS


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_layers=0), "num_layers=0: expected at least 1"),
        (dict(embed_dim=34, head_dim=0), "embed_dim=34 is not divisible by num_heads=4"),
        (dict(num_heads=3), "num_heads=3 is not divisible by num_kv_heads=2"),
        (dict(head_dim=15), "head_dim=15: rotary positions need an even number"),
        (dict(head_dim=-2), "head_dim=-2: expected more than 0"),
        (dict(local_rope_base=0.0), "local_rope_base=0.0: expected more than 0"),
        (dict(activation="relu"), "activation='relu': expected 'gelu' or 'silu'"),
        (
            dict(layer_pattern=("local", "far")),
            "layer_pattern=.*'far'.*: expected a sequence of 'local' and 'global'",
        ),
        (dict(layer_pattern=()), "layer_pattern=.*: expected a sequence"),
        (dict(window=0), "window=0: local layers need at least 1"),
        (dict(learned_positions=-1), "learned_positions=-1: expected at least 0"),
        (dict(other_bias=True), "other_bias=True: expected plain_mlp=True too"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(SIZES["gemma2_test"], **fields)
    with pytest.raises(UserError, match=f"^config.json: {message}"):
        TransformerConfig.from_dict(
            dataclasses.asdict(SIZES["gemma2_test"]) | fields, "config.json"
        )


def test_config_from_dict():
    # as JSON has it
    fields = dataclasses.asdict(SIZES["gemma2_test"]) | {"layer_pattern": ["local", "global"]}
    assert TransformerConfig.from_dict(fields, "x") == SIZES["gemma2_test"]
    with pytest.raises(UserError, match="widht"):
        TransformerConfig.from_dict(fields | {"widht": 3}, "x")
    with pytest.raises(UserError, match="architecture is None"):
        TransformerConfig.from_dict(None, "x")
    del fields["embed_dim"]
    with pytest.raises(UserError, match="embed_dim is missing"):
        TransformerConfig.from_dict(fields, "x")


def test_config_fills_in_what_is_left_out():
    config = TransformerConfig(
        6, 24, 4, 2, 40, 97, layer_pattern=("local", "local", "global"), window=3
    )
    assert (config.head_dim, config.query_scale) == (6, 6**-0.5)
    assert config.is_local == (True, True, False, True, True, False)


@pytest.mark.slow
def test_a_head_of_its_own_leaves_the_other_leaves_as_they_were_drawn():
    """Random decoders of old runs stay what they are."""
    tied = small.GEMMA
    untied = dataclasses.replace(tied, untied_head=True)
    one, two = (
        jax.jit(transformer.init, static_argnums=1)(jax.random.key(3), config)
        for config in (tied, untied)
    )
    assert two.pop("head").shape == two["embedding"].shape
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_later_fields_are_written_only_where_they_say_something():
    assert not set(ADDED_LATER) & small.GEMMA.to_dict().keys()
    assert small.LLAMA.to_dict()["untied_head"] is small.LLAMA.to_dict()["qkv_bias"] is True
    assert TransformerConfig.from_dict(small.LLAMA.to_dict(), "x") == small.LLAMA

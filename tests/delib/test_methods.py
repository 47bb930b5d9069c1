"""Every row of the table keeps the contract, and each begins as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib.delib import traces
from latent_delib.delib.methods import METHODS
from latent_delib.nn import cache as cache_lib
from latent_delib.nn.transformer import Transformer

B, T, M, L = 2, 6, 3, 5
CONFIG = small.GEMMA
MODEL = Transformer(CONFIG)
DECODER = jax.tree.map(jnp.asarray, small.decoder(CONFIG))
AT = jnp.array([[0, 2, 4], [1, 2, 3]])
TRACES = traces.lay_out(jnp.zeros((B, T), int), jnp.ones((B, T), int), AT, L, 2, "after")
WRITING = [name for name, method in METHODS.items() if method.latents]


def begin(name, seed=0, decoder=DECODER):
    return jax.jit(lambda key: METHODS[name].init(key, decoder, MODEL, L))(jax.random.key(seed))


def cache_of(seed, dtype=jnp.float32):
    """What some decoder might have read."""
    cache = cache_lib.empty(CONFIG, B, T, dtype)
    k, v = jax.random.normal(jax.random.key(seed), (2, *cache.k.shape), dtype)
    return cache._replace(k=k, v=v, position=jnp.tile(jnp.arange(T), (B, 1)), length=jnp.full((B,), T))


def test_the_rows_there_are():
    assert set(METHODS) == {"decoder", "cache_augmentation", "from_scratch", "pause_tokens"}
    assert WRITING == ["cache_augmentation", "from_scratch", "pause_tokens"]


@pytest.mark.parametrize("name", METHODS)
def test_trainable_tree(name):
    """What writes latents is a coprocessor that reads no tokens; what writes none trains the decoder."""
    shapes = jax.eval_shape(lambda: METHODS[name].init(jax.random.key(0), DECODER, MODEL, L))
    assert list(shapes) == ["coprocessor" if name in WRITING else "decoder"]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    if name not in WRITING:
        assert jax.tree.map(jnp.shape, shapes["decoder"]) == jax.tree.map(jnp.shape, DECODER)
        return
    tree = shapes["coprocessor"]
    assert "embedding" not in str(jax.tree.structure(shapes))
    assert tree["soft_tokens"].shape == (L, CONFIG.embed_dim)
    if name != "pause_tokens":
        body, wanted = ({n: t[n] for n in ("layers", "final_norm")} for t in (tree, DECODER))
        assert set(tree) == {"layers", "final_norm", "soft_tokens"}
        assert jax.tree.map(jnp.shape, body) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WRITING)
def test_latents_have_the_shape_and_the_dtype_of_the_cache(name, dtype):
    def write():
        tree = METHODS[name].init(jax.random.key(0), DECODER, MODEL, L)
        params = jax.tree.map(lambda x: x.astype(dtype), tree["coprocessor"])
        return METHODS[name].latents(params, MODEL, cache_of(0, dtype), TRACES)

    z = jax.eval_shape(write)
    assert z.shape == (B, M, L, CONFIG.embed_dim) and z.dtype == dtype


@pytest.mark.parametrize("name", WRITING)
def test_soft_tokens_are_distinct_rows_of_the_token_table(name):
    table = DECODER["embedding"]
    for seed in range(2):
        soft = np.array(begin(name, seed)["coprocessor"]["soft_tokens"])
        rows = np.argmax(np.all(soft[:, None] == table, axis=-1), axis=1)
        np.testing.assert_array_equal(soft, table[rows])
        assert len(set(rows.tolist())) == L
    assert not np.array_equal(soft, begin(name, 0)["coprocessor"]["soft_tokens"])


def test_soft_tokens_do_not_repeat_when_all_rows_are_taken():
    decoder = DECODER | {"embedding": DECODER["embedding"][:L]}
    soft = begin("pause_tokens", 0, decoder)["coprocessor"]["soft_tokens"]
    np.testing.assert_array_equal(np.sort(soft[:, 0]), np.sort(decoder["embedding"][:, 0]))


def test_cache_augmentation_starts_as_the_decoder():
    """Float32 master weights, of a decoder in bfloat16 too."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DECODER)
    for decoder in (DECODER, half):
        tree = begin("cache_augmentation", 0, decoder)["coprocessor"]
        for name in ("layers", "final_norm"):
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32)), tree[name], decoder[name])
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_from_scratch_starts_at_random():
    tree, again = (begin("from_scratch", seed)["coprocessor"] for seed in (0, 1))
    q, other = (t["layers"]["attn"]["q"] for t in (tree, again))
    assert not np.any(q == other) and not np.any(q == DECODER["layers"]["attn"]["q"])
    assert 0.8 < np.std(q) * CONFIG.embed_dim**0.5 < 1.2


def test_decoder_trains_the_decoder_itself():
    tree = METHODS["decoder"].init(jax.random.key(0), DECODER, MODEL, 0)
    assert tree["decoder"] is DECODER


def test_pause_tokens_ignore_the_text():
    tree = begin("pause_tokens")["coprocessor"]
    for seed in range(2):
        z = METHODS["pause_tokens"].latents(tree, MODEL, cache_of(seed), TRACES)
        np.testing.assert_array_equal(z, np.broadcast_to(tree["soft_tokens"], z.shape))


def test_a_coprocessor_reads_the_text():
    """The same weights over two caches: latents of every trace differ."""
    tree = begin("cache_augmentation")["coprocessor"]
    write = jax.jit(lambda cache: METHODS["cache_augmentation"].latents(tree, MODEL, cache, TRACES))
    one, other = write(cache_of(0)), write(cache_of(1))
    assert np.all(np.abs(one - other).max(axis=-1) > 1e-3)

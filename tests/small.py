"""Three small models, on which every feature is on or off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_delib.delib.traces import PLACEMENTS
from latent_delib.nn import transformer
from latent_delib.nn.cache import Cache
from latent_delib.nn.sizes import SIZES, TransformerConfig

# Softcaps low enough to bend these small scores and logits; two rotary bases that cannot be
# mistaken.
GEMMA = dataclasses.replace(
    SIZES["gemma2_test"], attn_softcap=2.0, final_softcap=3.0, local_rope_base=100.0
)
LLAMA = TransformerConfig(
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=40,
    vocab_size=97,
    activation="silu",
    rope_base=500.0,
    # cuts through its frequencies: some kept, some divided, some between
    rope_scaling=(8.0, 1.0, 4.0, 60.0),
    qk_norm=True,
    scale_embeddings=False,
    norm_eps=1e-5,
    norm_offset=0.0,
    untied_head=True,
    qkv_bias=True,
)
GPT2 = dataclasses.replace(
    SIZES["gpt2"],
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    query_scale=0.0,  # it follows from head_dim
    ffn_dim=128,
    vocab_size=97,
    learned_positions=64,
)
CONFIGS = {"gemma": GEMMA, "llama": LLAMA, "gpt2": GPT2}
# The paper's placement and one that reads the last token again; the others in slow tests.
TWO = ("after", "overlay")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PLACEMENTS if name not in TWO]
TWO_AND_SLOW = [*TWO, *SLOW]


def at_random(seed, shapes):
    """Random weights of these shapes, numpy float32, the scales of norms too.

    At their first value, zero, x * (1 + w), x + w and a forgotten weight look alike.
    """
    rng = np.random.default_rng(seed)
    width = {"scale": 0.3, "soft_tokens": 1.0}

    def one(path, x):
        return rng.normal(0, width.get(path[-1].key, 0.2), x.shape).astype(np.float32)

    return jax.tree.map_with_path(one, shapes)


def decoder(config, seed=0):
    return at_random(seed, jax.eval_shape(lambda: transformer.init(jax.random.key(0), config)))


def coprocessor(config, num_latents, seed=1):
    """Shaped like the decoder, and nothing like it in value."""
    tree = decoder(config, seed)
    for name in transformer.TABLES:
        tree.pop(name, None)
    return tree | at_random(seed + 1, {"soft_tokens": np.zeros((num_latents, config.embed_dim))})


def with_method(coprocessor, /, **changes):
    """The same parameters, as if `config.method` had these values in training."""
    record = coprocessor.record
    config = record.config | {"method": record.config["method"] | changes}
    return dataclasses.replace(coprocessor, record=dataclasses.replace(record, config=config))


def packed(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and segments [2, 40], two documents per row; traces [2, 5], at ends and in padding."""
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    segment_BT = np.array([[1] * 17 + [2] * 23, [1] * 9 + [2] * 21 + [0] * 10])
    return tokens_BT, segment_BT, np.array([[0, 3, 14, 16, 30], [2, 5, 12, 28, 39]])


def empty_cache(config: TransformerConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache with room for `capacity` entries per row."""
    kv = jnp.zeros(
        (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim), dtype
    )
    return Cache(kv, kv, jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((batch,), jnp.int32))


def named(line: str, *words: object) -> None:
    """A message holds all of these."""
    for word in words:
        assert str(word) in line, line

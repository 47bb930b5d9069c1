"""Rotary position embedding (Su et al. 2021), half-split as in Gemma and Llama checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.nn.sizes import TransformerConfig


def frequencies(head_dim: int, base: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Returns the angle per position of each pair of features, in radians, float64 [head_dim / 2].

    Args:
      head_dim: H.
      base: base of the geometric series of frequencies.
      scaling: () for none, or (factor, low, high, context) as in Llama 3.1. Frequencies with fewer
        than `low` turns in `context` tokens are divided by `factor`. Frequencies with more than
        `high` turns are kept. Those between are interpolated. A context of 0 divides all: linear
        scaling, as in Gemma 3.
    """
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if not scaling:
        return frequency
    factor, low, high, context = scaling
    kept = np.clip((frequency * context / (2 * np.pi) - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / factor)


def table(
    position: jax.Array,
    head_dim: int,
    base: float,
    scaling: tuple[float, ...] = (),
) -> jax.Array:
    """Returns cosines and sines at positions, float32 [2, *position.shape, head_dim / 2]."""
    frequency = frequencies(head_dim, base, scaling).astype(np.float32)
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def tables(config: TransformerConfig, position: jax.Array) -> jax.Array:
    """Returns the `table` of global layers and, where there are any, of local ones.

    Float32 [1 or 2, 2, *position.shape, head_dim / 2]. Layer l has table `int(config.is_local[l])`.
    """
    kinds = [(config.rope_base, config.rope_scaling)]
    if any(config.is_local):
        kinds.append((config.local_rope_base, ()))
    return jnp.stack([table(position, config.head_dim, *kind) for kind in kinds])


def rotate(x_BMSNH: jax.Array, table_2BMSH: jax.Array) -> jax.Array:
    """Rotates every head's halves by the angles of `table`.

    The computation is in float32, and the result has the dtype of x.
    """
    cos, sin = table_2BMSH[:, ..., None, :]
    first, second = jnp.split(x_BMSNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BMSNH.dtype)

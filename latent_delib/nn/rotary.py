"""Rotary position embedding (Su et al. 2021), half-split as in Gemma and Llama checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, base: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Radians a position turns each pair of features by, float64 [head_dim / 2].

    Args:
      scaling: () for none, or (factor, low, high, context) as in Llama 3.1: what turns fewer than `low` times
        in `context` tokens is divided by `factor`, what turns more than `high` times is kept, and what lies
        between is interpolated. A context of 0 divides all: linear scaling, as in Gemma 3.
    """
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if not scaling:
        return frequency
    factor, low, high, context = scaling
    kept = np.clip((frequency * context / (2 * np.pi) - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / factor)


def table(position: jax.Array, head_dim: int, base: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Angles' cosines and sines, float32 [2, *position.shape, head_dim / 2], of integer positions."""
    angle = position[..., None].astype(jnp.float32) * frequencies(head_dim, base, scaling).astype(np.float32)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotate(x_BMSNH: jax.Array, table_2BMSH: jax.Array) -> jax.Array:
    """Rotates every head's halves by the angles of `table`; float32 inside, the dtype of x outside."""
    cos, sin = table_2BMSH[:, ..., None, :]
    first, second = jnp.split(x_BMSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BMSNH.dtype)

"""Rotary position embedding (Su et al. 2021), half-split as in Gemma and Llama checkpoints."""

import jax
import jax.numpy as jnp


def table(position: jax.Array, head_dim: int, base: float) -> jax.Array:
    """Angles' cosines and sines, float32 [2, *position.shape, head_dim / 2], of integer positions."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotate(x_BMSNH: jax.Array, table_2BMSH: jax.Array) -> jax.Array:
    """Rotates every head's halves by the angles of `table`; float32 inside, the dtype of x outside."""
    cos, sin = table_2BMSH[:, ..., None, :]
    first, second = jnp.split(x_BMSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BMSNH.dtype)

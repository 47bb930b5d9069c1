"""Makes random keys from seeds."""

import jax


def key(seed: int) -> jax.Array:
    """Returns the random key of a seed.

    A seed gives the same numbers on every machine, whatever JAX_DEFAULT_PRNG_IMPL is there. With
    other generators than this one, numbers drawn under `vmap` depend on the whole batch.
    """
    return jax.random.key(seed, impl="threefry2x32")

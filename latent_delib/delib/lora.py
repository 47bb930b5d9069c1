"""Low-rank adaptation (Hu et al. 2022) as a pure function of a parameter tree.

A matrix w of a layer becomes w + a b; only a and b are trained. In a tree that lies over another, "q_a" and "q_b" stand
for "q" of the tree below.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from latent_delib.nn.layers import INPUT_AXES
from latent_delib.nn.products import precision
from latent_delib.nn.transformer import Params


def init(key: jax.Array, tree: Params, rank: int) -> Params:
    """Adapters for every matrix in a tree of layers, float32: a [layers, *in, r] random, b [layers, r, *out] zero, so
    that nothing is changed at the start."""
    adapters: Params = {}
    for i, (name, leaf) in enumerate(sorted(tree.items())):
        key_i = jax.random.fold_in(key, i)
        if isinstance(leaf, dict):
            adapters |= {name: below} if (below := init(key_i, leaf, rank)) else {}
        elif name in INPUT_AXES:
            before, after = leaf.shape[: 1 + INPUT_AXES[name]], leaf.shape[1 + INPUT_AXES[name] :]
            fan_in = math.prod(before[1:])
            adapters[f"{name}_a"] = jax.random.normal(key_i, (*before, rank)) * fan_in**-0.5
            adapters[f"{name}_b"] = jnp.zeros((leaf.shape[0], rank, *after))
    return adapters


def lay_over(below: Params, tree: Params) -> Params:
    """The leaves of both trees, those of `tree` where both have one, and adapters multiplied out.

    Leaves that `tree` does not replace or adapt are those of `below` themselves.
    """
    found: Params = {}
    for name, leaf in below.items():
        if isinstance(leaf, dict):
            found[name] = lay_over(leaf, tree.get(name, {}))
        elif f"{name}_a" in tree:
            a, b = tree[f"{name}_a"], tree[f"{name}_b"]
            change = jax.vmap(partial(jnp.tensordot, axes=1, precision=precision(a, b)))(a, b)
            found[name] = leaf + change.astype(leaf.dtype)
        else:
            found[name] = tree.get(name, leaf)
    adapted = {f"{name}_{part}" for name in below for part in "ab"}
    return found | {name: leaf for name, leaf in tree.items() if name not in below and name not in adapted}

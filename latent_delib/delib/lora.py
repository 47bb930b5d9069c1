"""Low-rank adaptation (Hu et al. 2021) as a pure function of a parameter tree.

A matrix w of a layer becomes w + a b; only a and b are trained. In a tree of adapters, "q_a" and
"q_b" belong to the matrix "q" of the adapted tree.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from latent_delib.nn.layers import INPUT_AXES
from latent_delib.nn.products import matmul
from latent_delib.nn.transformer import Params


def init(key: jax.Array, tree: Params, rank: int) -> Params:
    """Makes adapters for every matrix in a tree of layers, float32.

    a [layers, *in, r] is random. b [layers, r, *out] is zero, so that adapters change nothing at
    the start.
    """
    adapters: Params = {}
    for i, (name, leaf) in enumerate(sorted(tree.items())):
        leaf_key = jax.random.fold_in(key, i)
        if isinstance(leaf, dict):
            below = init(leaf_key, leaf, rank)
            if below:
                adapters[name] = below
        elif name in INPUT_AXES:
            split = 1 + INPUT_AXES[name]
            layers, *inputs = leaf.shape[:split]
            outputs = leaf.shape[split:]
            fan_in = math.prod(inputs)
            a = jax.random.normal(leaf_key, (layers, *inputs, rank))
            adapters[f"{name}_a"] = a * fan_in**-0.5
            adapters[f"{name}_b"] = jnp.zeros((layers, rank, *outputs))
    return adapters


def merge(base: Params, tree: Params) -> Params:
    """Returns the tree `base` with `tree` merged into it.

    A leaf of `tree` replaces the leaf of its name. A pair of adapters adds its product to its
    matrix. All other leaves are the arrays of `base` themselves.
    """
    found: Params = {}
    for name, leaf in base.items():
        if isinstance(leaf, dict):
            found[name] = merge(leaf, tree.get(name, {}))
        elif f"{name}_a" in tree:
            a, b = tree[f"{name}_a"], tree[f"{name}_b"]
            change = jax.vmap(partial(matmul, contracted=1))(a, b)
            found[name] = leaf + change.astype(leaf.dtype)
        else:
            found[name] = tree.get(name, leaf)
    for name, leaf in tree.items():
        is_adapter = name.removesuffix("_a").removesuffix("_b") in base
        if name not in base and not is_adapter:
            found[name] = leaf
    return found

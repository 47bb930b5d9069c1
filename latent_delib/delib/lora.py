"""Low-rank adaptation (Hu et al. 2021) as a pure function of a parameter tree.

A matrix w of a layer becomes w + a b; only a and b are trained. The adapters "q_a" and "q_b" belong
to the matrix "q".
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


def join(base: Params, tree: Params) -> Params:
    """Returns the tree `base` with `tree` laid over it.

    A leaf of `tree` replaces the leaf of its name. Adapters stand beside their matrix, and a layer
    adds their product to that of the matrix (`nn.layers.dense`). If `base` has adapters of the same
    matrix, both pairs become one of the summed rank.
    """
    found = dict(base)
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            found[name] = join(base.get(name, {}), leaf)
        elif name in base and _matrix_of(name):
            rank_axis = -1 if name.endswith("_a") else 1
            found[name] = jnp.concatenate([base[name], leaf], rank_axis)
        else:
            found[name] = leaf
    return found


def multiply_out(tree: Params) -> Params:
    """Returns a tree without adapters: each pair is multiplied, and added to its matrix."""
    found: Params = {}
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            found[name] = multiply_out(leaf)
        elif f"{name}_a" in tree:
            change = jax.vmap(partial(matmul, contracted=1))(tree[f"{name}_a"], tree[f"{name}_b"])
            found[name] = leaf + change.astype(leaf.dtype)
        elif not _matrix_of(name):
            found[name] = leaf
    return found


def _matrix_of(name: str) -> str:
    """Returns the name of the matrix that an adapter belongs to; "" for another leaf."""
    matrix, _, part = name.rpartition("_")
    return matrix if part in ("a", "b") and matrix in INPUT_AXES else ""

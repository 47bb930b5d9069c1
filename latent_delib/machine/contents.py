"""Describes a checkpoint by the type and checksum of each leaf, so that damage is found later."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe(meta: Mapping[str, Any], trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {tree: {leaf: [type, sum]}} for JSON, with a "crc32" of that and of the meta."""
    contents: dict[str, Any] = {}
    for name, tree in trees.items():
        types, sums = leaf_types(tree), leaf_sums(tree)
        contents[name] = {leaf: [types[leaf], sums[leaf]] for leaf in types}
    return contents | {"crc32": _crc32(meta, contents)}


def is_whole(meta: Mapping[str, Any], contents: Mapping[str, Any]) -> bool:
    """Tells whether meta and contents are as they were saved."""
    leaves = {name: part for name, part in contents.items() if name != "crc32"}
    return contents["crc32"] == _crc32(meta, leaves)


def changed_leaves(contents: Mapping[str, Any], trees: Mapping[str, Any]) -> list[str]:
    """Returns the leaves that are not as they were saved."""
    changed = []
    for name, tree in trees.items():
        for leaf, found in leaf_sums(tree).items():
            if found != contents[name][leaf][1]:
                changed.append(f"{name}: {leaf}")
    return changed


def leaf_types(tree: Any) -> dict[str, str]:
    """Returns each leaf's dtype and shape, such as float32[64, 8]."""
    leaves = by_name(tree)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def leaf_sums(tree: Any) -> dict[str, int]:
    """Returns the sum of each leaf's bits, read as integers, modulo 2**32.

    Any flipped bit changes the sum; the mesh does not change it. JAX's arrays are added up on their
    devices. numpy's arrays never go to a device.
    """
    leaves = by_name(tree)
    if any(isinstance(leaf, jax.Array) for leaf in leaves.values()):
        sums = jax.device_get(_sums_on_devices(leaves))
    else:
        sums = jax.tree.map(_sum_on_host, leaves)
    return jax.tree.map(int, sums)


@jax.jit
def _sums_on_devices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(_sum_on_device, leaves)


def _sum_on_device(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jnp.sum(bits, dtype=jnp.uint32)


def _sum_on_host(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(f"u{min(x.dtype.itemsize, 4)}")
    return bits.sum(dtype=np.uint32)


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their dotted names, such as coprocessor.layers.wq."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _crc32(*parts: Any) -> int:
    return zlib.crc32(json.dumps(parts).encode())

"""The one file that names mesh axes: the mesh, the rules from logical axes to it, and shardings made of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Weights lie on fsdp along the width and on tensor along heads, features and vocabulary.
PARAMETERS = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "ffn": "tensor", "layers": None}
# Activations: rows over data and fsdp together; heads and features follow the weights.
ACTIVATIONS = {"batch": ("data", "fsdp"), "traces": None, "heads": "tensor", "ffn": "tensor"}


def make(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Raises:
      UserError: unknown axes, or sizes whose product is not the number of devices.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"config.mesh: unknown axes {unknown}, expected {AXES}")
    shape, count = [sizes[axis] for axis in AXES], jax.device_count()
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = count // max(1, math.prod(n for n in shape if n != -1))
    if min(shape) < 1 or math.prod(shape) != count:
        raise UserError(f"config.mesh: {dict(zip(AXES, shape))} does not make the {count} devices at hand")
    return Mesh(np.asarray(jax.devices()).reshape(shape), AXES)


def spec(axes: tuple[str | None, ...], rules: Mapping[str, Any]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; None is an axis that is never split.

    Raises:
      ValueError: a logical axis without a rule, or two axes of one array on the same mesh axis.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"no sharding rule for logical axes {unknown}; rules: {dict(rules)}")
    parts = [rules[axis] if axis is not None else None for axis in axes]
    used = [name for part in parts if part for name in ((part,) if isinstance(part, str) else part)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} put two dimensions on one mesh axis: {parts}")
    return PartitionSpec(*parts)


def parameters(mesh: Mesh, tree: Any, axes: Mapping[str, tuple[str | None, ...]]) -> Any:
    """A NamedSharding for every leaf of a parameter tree (arrays or their shapes), by the leaf's name.

    Raises:
      UserError: a dimension that its mesh axis does not divide.
      ValueError: a leaf whose name `axes` does not know.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if path[-1].key not in axes:
            raise ValueError(f"parameter {name} has no logical axes; there are some for {sorted(axes)}")
        logical = axes[path[-1].key][-leaf.ndim :]
        partition = spec(logical, PARAMETERS)
        for size, axis in zip(leaf.shape, partition):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(f"config.mesh.{axis}={mesh.shape[axis]} does not divide {name} {tuple(leaf.shape)}")
        return NamedSharding(mesh, partition)

    return jax.tree.map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Batches: rows split over data and fsdp."""
    return NamedSharding(mesh, spec(("batch",), ACTIVATIONS))


def constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The function that `nn` calls on activations, with the names of their axes."""

    def place(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, ACTIVATIONS)))

    return place


def split(mesh: Mesh) -> Callable[[Callable, Any, Any], Callable]:
    """The function that `nn` wraps what a compiler cannot split: every device runs it on its own rows and heads."""

    def on_each_device(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        if mesh.size == 1:
            return function

        def specs(tree: Any) -> Any:
            def is_axes(x: Any) -> bool:
                return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)

            return jax.tree.map(lambda axes: spec(axes, ACTIVATIONS), tree, is_leaf=is_axes)

        return jax.shard_map(function, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)

    return on_each_device


def table(shardings: Any, tree: Any) -> str:
    """One line a leaf: name, shape, spec."""
    lines = []
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        lines.append(f"  {name:<44} {'x'.join(map(str, leaf.shape)):<20} {sharding.spec}")
    return "\n".join(lines)

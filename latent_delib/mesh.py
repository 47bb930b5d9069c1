"""The one file that maps arrays to mesh axes: the mesh, the rules from logical axes to it, and shardings."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.errors import UserError
from latent_delib.nn.products import einsum

AXES = ("data", "fsdp", "traces", "tensor")
ROWS = ("data", "fsdp")

# Logical axis -> mesh axes. Where weights lie: along the width on fsdp, and on traces, which would hold the same
# otherwise; along heads, features and vocabulary on tensor.
WEIGHTS = {"vocab": "tensor", "embed": ("fsdp", "traces"), "heads": "tensor", "ffn": "tensor", "layers": None}
# Where they stand while they are used: whole along the width.
IN_USE = WEIGHTS | {"embed": None}
# Activations: rows over data and fsdp together, the traces of a row over traces; heads and features follow the weights.
ACTIVATIONS = {"batch": ROWS, "traces": "traces", "heads": "tensor", "ffn": "tensor"}

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]


def make(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, neighbours in it being neighbours on a slice; one size may be -1: what the others leave.
    An axis without a size has length 1.

    Raises:
      UserError: unknown axes, or sizes whose product is not the number of devices.
    """
    here = devices is None and jax.process_count() == 1
    devices = jax.devices() if devices is None else devices
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"the mesh has no axis {', '.join(unknown)}; its axes are {', '.join(AXES)}")
    shape, count = [sizes.get(axis, 1) for axis in AXES], len(devices)
    for axis, length in zip(AXES, shape):
        if length < 1 and length != -1:
            raise UserError(f"mesh axis {axis}={length}: expected at least 1, or -1 for what the others leave")
    if shape.count(-1) > 1:
        raise UserError(f"{shape.count(-1)} mesh axes are -1, what the others leave: expected one at most")
    product, found = math.prod(n for n in shape if n != -1), f"{count} {'device' if count == 1 else 'devices'}"
    owner = "this machine" if here else "the job"
    if -1 in shape and count % product:
        raise UserError(f"the mesh axes beside the -1 multiply to {product}, which does not divide {owner}'s {found}")
    shape = [count // product if n == -1 else n for n in shape]
    if math.prod(shape) != count:
        raise UserError(f"the mesh axes multiply to {product}, {owner} has {found}; one axis may be -1, what is left")
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; None is an axis that is never split.

    Raises:
      ValueError: a logical axis without a rule, or two axes of one array on the same mesh axis.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"no sharding rule for logical axes {unknown}; rules: {dict(rules)}")
    parts = [rules[axis] if axis is not None else None for axis in axes]
    used = [name for part in parts for name in _names(part)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} put two dimensions on one mesh axis: {parts}")
    return PartitionSpec(*parts)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part


def parameters(mesh: Mesh, tree: Any, axes: Mapping[str, Axes]) -> Any:
    """A NamedSharding for every leaf of a parameter tree (arrays or their shapes), by the leaf's name.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
      ValueError: a leaf whose name `axes` does not know.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if path[-1].key not in axes:
            raise ValueError(f"parameter {name} has no logical axes; there are some for {sorted(axes)}")
        partition = spec(axes[path[-1].key][-leaf.ndim :], WEIGHTS)
        for size, part in zip(leaf.shape, partition):
            wanted = {axis: mesh.shape[axis] for axis in _names(part)}
            if size % math.prod(wanted.values()):
                split = " x ".join(f"{axis}={n}" for axis, n in wanted.items())
                raise UserError(f"the mesh: {split} does not divide {name} {tuple(leaf.shape)}: expected a divisor")
        return NamedSharding(mesh, partition)

    return jax.tree.map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Batches: rows split over data and fsdp."""
    return NamedSharding(mesh, spec(("batch",), ACTIVATIONS))


def shards(mesh: Mesh, axis: str) -> int:
    """Returns into how many parts the mesh splits a logical axis of activations: "batch", "traces", "heads", "ffn"."""
    return math.prod(mesh.shape[name] for name in _names(ACTIVATIONS[axis]))


def row_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return shards(mesh, "batch")


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of `count` rows lie on this process's devices, in order; int64. Several processes may share a row."""
    slices = rows(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def place_rows(mesh: Mesh, local: Any, count: int) -> Any:
    """A batch of `count` rows over the mesh, from a tree of numpy arrays of this process's `local_rows`."""
    here = local_rows(mesh, count)

    def one(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            return x[np.searchsorted(here, start) : np.searchsorted(here, stop)]

        return jax.make_array_from_callback((count, *x.shape[1:]), rows(mesh), part)

    return jax.tree.map(one, local)


def constrain(mesh: Mesh) -> Callable[[jax.Array, Axes], jax.Array]:
    """The function that `nn` calls on activations, with the names of their axes; an axis of length 1 is not split."""

    def place(x: jax.Array, axes: Axes) -> jax.Array:
        axes = tuple(axis if n > 1 else None for axis, n in zip(axes, x.shape, strict=True))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, ACTIVATIONS)))

    return place


def gather(mesh: Mesh) -> Callable[[jax.Array, Axes], jax.Array]:
    """The function that `nn` calls on a table of vectors to have it whole along the width."""

    def place(w: jax.Array, axes: Axes) -> jax.Array:
        whole, own = (NamedSharding(mesh, spec(axes, rules)) for rules in (IN_USE, WEIGHTS))

        @jax.custom_vjp
        def gathered(w: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(w, whole)

        gathered.defvjp(lambda w: (gathered(w), None), lambda _, dw: (jax.lax.with_sharding_constraint(dw, own),))
        return gathered(w)

    return place


def product(mesh: Mesh) -> Callable[..., jax.Array]:
    """The function that `nn` calls to multiply activations by a weight: each device gathers the weight, uses it on its
    own rows and traces, and forgets it; the gradient is reduce-scattered to where the weight lies.

    Written out, because a compiler that splits products by itself sums whole gradients on every chip, or moves
    activations instead of weights. Heads and features, where tensor splits them, are left to it.
    """
    width = WEIGHTS["embed"]
    # An axis that is left to the compiler for CPUs makes it abort on sums of bfloat16 over the others.
    by_hand = {*ROWS, *width} if mesh.shape["tensor"] > 1 else {*mesh.axis_names}

    def specs(axes: Axes, rules: Rules) -> PartitionSpec:
        return spec(axes, {axis: part if by_hand.issuperset(_names(part)) else None for axis, part in rules.items()})

    def multiply(equation: str, x: jax.Array, w: jax.Array, x_axes: Axes, w_axes: Axes, y_axes: Axes) -> jax.Array:
        if mesh.size == mesh.shape["tensor"]:  # nothing to gather
            return einsum(equation, x, w)

        def on_each_device(x: jax.Array, w: jax.Array) -> jax.Array:
            return einsum(equation, x, jax.lax.all_gather(w, width, axis=w_axes.index("embed"), tiled=True))

        alone = {axis: None for axis, n in zip(x_axes, x.shape, strict=True) if axis and n == 1}
        activations = ACTIVATIONS | alone
        return jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(specs(x_axes, activations), specs(w_axes, WEIGHTS)),
            out_specs=specs(y_axes, activations),
            axis_names=by_hand,
            check_vma=False,
        )(x, w)

    return multiply


def split(mesh: Mesh) -> Callable[[Callable, Any, Any], Callable]:
    """The function that `nn` wraps what a compiler cannot split: each device runs it on its own rows, traces and heads.

    Of the logical axes that its arguments name, those of length 1 are not split.
    """

    def on_each_device(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        if mesh.size == 1:
            return function

        def is_axes(x: Any) -> bool:
            return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)

        def specs(tree: Any, rules: Rules) -> Any:
            return jax.tree.map(lambda axes: spec(axes, rules), tree, is_leaf=is_axes)

        def call(*args: Any) -> Any:
            named = zip(jax.tree.leaves(in_axes, is_leaf=is_axes), jax.tree.leaves(args), strict=True)
            lengths = {axis: n for axes, x in named for axis, n in zip(axes, x.shape) if axis}
            rules = {axis: ACTIVATIONS[axis] if n > 1 else None for axis, n in lengths.items()}
            inside, out = specs(in_axes, rules), specs(out_axes, rules)
            return jax.shard_map(function, mesh=mesh, in_specs=inside, out_specs=out, check_vma=False)(*args)

        return call

    return on_each_device


def table(tree: Any) -> str:
    """One line a leaf of a tree that carries shardings: name, shape, spec."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        lines.append(f"  {name:<44} {'x'.join(map(str, leaf.shape)):<20} {leaf.sharding.spec}")
    return "\n".join(lines)

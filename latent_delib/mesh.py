"""Makes the mesh, and shardings by rules.

Models name the logical axes of their arrays. The three tables of rules below say which mesh axes
split each logical axis.

Elsewhere mesh axes are named only where a user chooses a mesh: in `config.mesh`, in the flags of
generate and benchmark, and in the search over meshes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.errors import UserError
from latent_delib.machine import arguments
from latent_delib.machine.contents import by_name
from latent_delib.nn.layers import Axes, contracted
from latent_delib.nn.products import matmul

AXES = ("data", "fsdp", "traces", "tensor")
ROWS = ("data", "fsdp")

# Logical axis -> mesh axes. Weights are split along the width over fsdp, and over traces, whose
# devices would otherwise hold copies; along heads, features and vocabulary over tensor.
WEIGHTS = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "traces"),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "layers": (),
}
# Weights while they are used are whole along the width.
IN_USE = WEIGHTS | {"embed": ()}
# Activations: rows are split over data and fsdp together, the traces of a row over traces, heads
# and features like the weights.
ACTIVATIONS = {"batch": ROWS, "traces": ("traces",), "heads": ("tensor",), "ffn": ("tensor",)}

Rules = Mapping[str, tuple[str, ...]]


def make(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh over the given devices; neighbours in it are neighbours on a slice.

    Where a slower network joins several slices, each slice holds a range of the data axis. All
    other axes stay within a slice.

    Args:
      sizes: length of each mesh axis, 1 where none is given. One may be -1, which takes the rest of
        the devices.
      devices: devices of the mesh; by default all devices of the job.

    Raises:
      UserError: unknown axes, sizes that are not whole or whose product is not the number of
        devices, or a data axis that several slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(
            f"the mesh has no axis {', '.join(unknown)}; its axes are {', '.join(AXES)}"
        )
    lowest = -arguments.INT32
    shape = [arguments.whole(f"mesh axis {axis}", sizes.get(axis, 1), lowest) for axis in AXES]
    for axis, length in zip(AXES, shape):
        if length < 1 and length != -1:
            raise UserError(
                f"mesh axis {axis}={length}: expected at least 1, or -1 for the rest of the devices"
            )
    if shape.count(-1) > 1:
        raise UserError(f"{shape.count(-1)} mesh axes are -1: expected one at most")
    count = len(devices)
    product = math.prod(length for length in shape if length != -1)
    expected = f"a divisor of {count}" if -1 in shape else f"{count}"
    if count % product or (product < count and -1 not in shape):
        raise UserError(
            f"the mesh axes multiply to {product}: expected {expected}, the number of devices; "
            "one axis may be -1, which takes the rest"
        )
    shape = [count // product if length == -1 else length for length in shape]
    return Mesh(_grid(shape, devices), AXES)


def _grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as an array of this shape, whose first axis runs over the slices."""
    # a GPU has a slice_index too: it numbers the hosts and says nothing about a slower network
    tpus = [device for device in devices if device.platform == "tpu"]
    slices = {getattr(device, "slice_index", 0) for device in tpus}
    if len(slices) < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *others = shape
    if data % len(slices):
        raise UserError(
            f"mesh axis data={data}: expected a multiple of {len(slices)}, the number of slices; "
            "only the data axis crosses the network between them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [data // len(slices), *others],
        [len(slices), *(1 for _ in others)],
        devices,
        allow_split_physical_axes=True,
    )


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """Returns the PartitionSpec of an array by its logical axes; an axis None is never split.

    Raises:
      ValueError: a logical axis without a rule, or two axes of one array on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no sharding rule for logical axes {unknown}; rules: {dict(rules)}")
    parts = [rules[axis] if axis is not None else () for axis in axes]
    used = [name for part in parts for name in part]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} put two dimensions on one mesh axis: {parts}")
    return PartitionSpec(*parts)


def shards(mesh: Mesh, axis: str, rules: Rules = ACTIVATIONS) -> int:
    """Returns the number of parts into which the mesh splits a logical axis.

    axis: an axis of activations, "batch", "traces", "heads" or "ffn"; with rules=WEIGHTS an axis of
      weights.
    """
    return math.prod(mesh.shape[name] for name in rules[axis])


def setting(mesh: Mesh, axis: str) -> str:
    """Returns the config keys that split an axis of activations: "config.mesh.tensor=2"."""
    return " x ".join(f"config.mesh.{name}={mesh.shape[name]}" for name in ACTIVATIONS[axis])


def parameters(mesh: Mesh, tree: Any, axes: Mapping[str, Axes]) -> Any:
    """Returns a NamedSharding for every leaf of a parameter tree, by the leaf's name.

    Args:
      tree: arrays or their shapes.
      axes: name of a leaf -> its logical axes.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
      ValueError: a leaf whose name `axes` does not know.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if path[-1].key not in axes:
            raise ValueError(
                f"parameter {name} has no logical axes: give them in `axes` of its row of METHODS; "
                f"known parameters: {sorted(axes)}"
            )
        own_axes = axes[path[-1].key][-leaf.ndim :]
        partition = spec(own_axes, WEIGHTS)
        for size, axis in zip(leaf.shape, own_axes):
            lengths = {part: mesh.shape[part] for part in WEIGHTS.get(axis, ())}
            if size % math.prod(lengths.values()):
                split = " x ".join(f"{part}={length}" for part, length in lengths.items())
                raise UserError(
                    f"{name} {tuple(leaf.shape)}: an axis of length {size} does not split over "
                    f"mesh axes {split}"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map_with_path(sharding, tree)


def optimizer_state(mesh: Mesh, tx: optax.GradientTransformation, trainable: Any) -> Any:
    """Returns an optimizer's state as a tree of ShapeDtypeStruct with shardings.

    A leaf in the shape of its parameter is sharded like the parameter. A leaf that lacks one of the
    parameter's axes, as Adafactor's row and column sums do, is sharded like the remaining axes. All
    other leaves are replicated. Where Muon keeps nothing for a parameter, optax's placeholder
    stays.

    Args:
      trainable: the parameters, a tree of ShapeDtypeStruct with shardings.
    """

    def is_placeholder(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    def like(leaf: Any, parameter: Any) -> Any:
        if is_placeholder(leaf):
            return leaf
        sharding = NamedSharding(mesh, _partition_like(leaf.shape, parameter))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def unlike(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    state = jax.eval_shape(tx.init, trainable)
    return optax.tree.map_params(
        tx, like, state, trainable, transform_non_params=unlike, is_leaf=is_placeholder
    )


def _partition_like(shape: tuple[int, ...], parameter: Any) -> PartitionSpec:
    """Returns the PartitionSpec of an optimizer's array that belongs to a parameter."""
    partition = tuple(parameter.sharding.spec)
    if shape == parameter.shape:
        return PartitionSpec(*partition)
    for lost in range(len(parameter.shape)):
        remaining = parameter.shape[:lost] + parameter.shape[lost + 1 :]
        if shape == remaining:
            return PartitionSpec(*partition[:lost], *partition[lost + 1 :])
    return PartitionSpec()


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: rows are split, all other axes are whole."""
    return NamedSharding(mesh, spec(("batch",), ACTIVATIONS))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Returns the indices of those of `count` rows that this process's devices hold, sorted int64.

    Several processes may hold the same row.
    """
    slices = rows(mesh).addressable_devices_indices_map((count,)).values()
    everything = np.arange(count)
    return np.unique(np.concatenate([everything[index] for index in slices]))


def place_rows(mesh: Mesh, local: Any, count: int) -> Any:
    """Places a batch of `count` rows on the mesh.

    Args:
      local: a tree of numpy arrays, this process's `local_rows` of the batch.
    """

    def place(x: np.ndarray) -> jax.Array:
        shape = (count, *x.shape[1:])
        return jax.make_array_from_process_local_data(rows(mesh), x, shape)

    return jax.tree.map(place, local)


# The functions that `nn` gets as fields of its `Partition`.


def _activations(*arrays: tuple[Axes, jax.Array]) -> Rules:
    """Returns the rules of activations for arrays with these axes; axes of length 1 stay whole."""
    rules = dict(ACTIVATIONS)
    for axes, x in arrays:
        for axis, length in zip(axes, x.shape, strict=True):
            if axis and length == 1:
                rules[axis] = ()
    return rules


def constrain(mesh: Mesh) -> Callable[[jax.Array, Axes], jax.Array]:
    """Returns the function that splits an activation by its axes; axes of length 1 stay whole."""

    def place(x: jax.Array, axes: Axes) -> jax.Array:
        sharding = NamedSharding(mesh, spec(axes, _activations((axes, x))))
        return jax.lax.with_sharding_constraint(x, sharding)

    return place


def gather(mesh: Mesh) -> Callable[[jax.Array, Axes], jax.Array]:
    """Returns the function that makes a table of vectors whole along the width."""

    def place(w: jax.Array, axes: Axes) -> jax.Array:
        whole = NamedSharding(mesh, spec(axes, IN_USE))
        own = NamedSharding(mesh, spec(axes, WEIGHTS))

        @jax.custom_vjp
        def gathered(w: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(w, whole)

        def forward(w: jax.Array) -> tuple[jax.Array, None]:
            return gathered(w), None

        def backward(_: None, dw: jax.Array) -> tuple[jax.Array]:
            return (jax.lax.with_sharding_constraint(dw, own),)

        gathered.defvjp(forward, backward)
        return gathered(w)

    return place


def product(mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns the function that multiplies activations by a weight.

    Each device gathers the weight, uses it on its own rows and traces, and drops it. The gradient
    is reduce-scattered to the shards of the weight. These steps are written out, because a compiler
    that splits products by itself sums whole gradients on every chip, or moves activations instead
    of weights. Heads and features, which tensor splits, are left to the compiler.
    """
    width = WEIGHTS["embed"]
    flat = mesh.devices.flat[0].platform == "cpu"
    # An axis not in `by_hand` is left to the compiler: tensor, if it splits anything. The compiler
    # for CPUs aborts on sums of bfloat16 over some axes when it has to split others.
    by_hand = {*ROWS, *width} if mesh.shape["tensor"] > 1 else {*mesh.axis_names}

    def specs(axes: Axes, rules: Rules) -> PartitionSpec:
        chosen = {}
        for axis, mesh_axes in rules.items():
            chosen[axis] = mesh_axes if by_hand.issuperset(mesh_axes) else ()
        return spec(axes, chosen)

    def multiply(
        x: jax.Array,
        w: jax.Array,
        x_axes: Axes,
        w_axes: Axes,
        y_axes: Axes,
        dtype: Any = None,
    ) -> jax.Array:
        count = contracted(x_axes, w_axes, y_axes)
        if mesh.size == mesh.shape["tensor"] or "embed" not in w_axes:  # nothing to gather
            return matmul(x, w, count, flat, dtype)

        def on_each_device(x: jax.Array, w: jax.Array) -> jax.Array:
            whole = jax.lax.all_gather(w, width, axis=w_axes.index("embed"), tiled=True)
            return matmul(x, whole, count, flat, dtype)

        activations = _activations((x_axes, x))
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
    """Returns the wrapper of functions that a compiler cannot split.

    Each device runs the function on its own rows, traces and heads. Axes of length 1 are not split.
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)

    def on_each_device(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        if mesh.size == 1:
            return function

        def call(*args: Any) -> Any:
            leaves = jax.tree.leaves(in_axes, is_leaf=is_axes)
            rules = _activations(*zip(leaves, jax.tree.leaves(args), strict=True))

            def specs(tree: Any) -> Any:
                return jax.tree.map(lambda axes: spec(axes, rules), tree, is_leaf=is_axes)

            return jax.shard_map(
                function,
                mesh=mesh,
                in_specs=specs(in_axes),
                out_specs=specs(out_axes),
                check_vma=False,
            )(*args)

        return call

    return on_each_device


def table(tree: Any) -> str:
    """Returns one line per leaf of a tree that carries shardings: name, shape, spec."""
    lines = []
    for name, leaf in by_name(tree).items():
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"  {name:<44} {shape:<20} {leaf.sharding.spec}")
    return "\n".join(lines)

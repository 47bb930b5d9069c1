"""Mesh and sharding rules: the table of the tiny decoder, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_delib import mesh as mesh_lib
from latent_delib.delib.coprocessor import AXES
from latent_delib.errors import UserError
from latent_delib.nn.layers import FEATURES, PARAM_AXES, TRACES
from latent_delib.nn.sizes import SIZES
from latent_delib.weights import folder

DTYPES = (jnp.float32, jnp.bfloat16)


def sizes(data=1, fsdp=1, traces=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "traces": traces, "tensor": tensor}


TENSOR = sizes(2, 2, 1, 2)
WIDTH = ("fsdp", "traces")


def test_minus_one_takes_what_the_others_leave():
    assert dict(mesh_lib.make(sizes(data=-1, fsdp=2)).shape) == sizes(data=4, fsdp=2)
    assert dict(mesh_lib.make(sizes(fsdp=2, tensor=-1)).shape) == sizes(fsdp=2, tensor=4)
    assert dict(mesh_lib.make(TENSOR).shape) == TENSOR


@pytest.mark.parametrize(
    "sizes, words",
    [
        (sizes(data=3), "multiply to 3.* 8"),
        (sizes(data=16), "multiply to 16.* 8"),
        (sizes(data=-1, fsdp=3), "multiply to 3.*divisor of 8"),
        (sizes(data=-1, fsdp=16), "multiply to 16.*divisor of 8"),
        (sizes(data=-1, fsdp=-1, tensor=8), "2 mesh axes are -1"),
        (sizes(data=0, tensor=8), "data=0"),
        (sizes(data=-1, fsdp=0), "fsdp=0"),
        (sizes(data=8, tensor=-2), "tensor=-2"),
        (sizes(data=8.0), "mesh axis data=8.0: expected a whole number"),
        (sizes(data="8"), "mesh axis data='8': expected a whole number"),
        (sizes(data=-1) | {"model": 1}, "axis model.*data, fsdp, traces, tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        mesh_lib.make(sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as `mesh.make` sees it: a chip of one of several slices."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0


def test_only_the_data_axis_crosses_slices():
    # three slices of 2 x 4 chips; jax promises no order
    chips = [Chip(id, id % 3, (id // 3 % 2, id // 6, 0)) for id in range(24)]
    mesh = mesh_lib.make(sizes(data=6, fsdp=2, tensor=2), chips)
    assert {chip.id for chip in mesh.devices.flat} == set(range(24))
    for index, row in enumerate(mesh.devices):
        assert {chip.slice_index for chip in row.flat} == {index // 2}

    for data, others in ((8, 3), (2, 12)):
        with pytest.raises(UserError, match=f"data={data}: expected a multiple of 3.* slices"):
            mesh_lib.make(sizes(data=data, fsdp=others), chips)
    assert mesh_lib.make(sizes(data=-1, fsdp=8), chips).shape["data"] == 3


def test_hosts_of_gpus_are_no_slices():
    gpus = [Chip(id, id // 8, platform="gpu") for id in range(16)]
    assert mesh_lib.make(sizes(fsdp=16), gpus).shape["fsdp"] == 16


@pytest.mark.parametrize(
    "axes, rules, words",
    [
        (("layers", "width"), mesh_lib.WEIGHTS, "'width'"),
        (("heads", "ffn"), mesh_lib.WEIGHTS, "ffn.*one mesh axis"),
        (("embed", "embed"), mesh_lib.WEIGHTS, "embed.*one mesh axis"),
        (("batch", "rows"), {"batch": ("data", "fsdp"), "rows": ("fsdp",)}, "rows.*one mesh axis"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(axes, rules, words):
    with pytest.raises(ValueError, match=words):
        mesh_lib.spec(axes, rules)


def test_a_dimension_that_does_not_divide_is_named():
    shapes = folder.shapes(SIZES["gemma2_test"])  # 97 token rows
    with pytest.raises(UserError, match=r"embedding \(97, 32\).* 97 .*tensor=2"):
        mesh_lib.parameters(mesh_lib.make(TENSOR), shapes, PARAM_AXES)


def test_where_every_parameter_of_a_decoder_lies():
    shapes = folder.shapes(SIZES["gemma2_test"])
    shardings = mesh_lib.parameters(mesh_lib.make(sizes(data=4, fsdp=2)), shapes, PARAM_AXES)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    assert {jax.tree_util.keystr(p, simple=True, separator="."): s.spec for p, s in leaves} == {
        "embedding": P("tensor", WIDTH),
        "final_norm.scale": P(None),
        "layers.attn.k": P(None, WIDTH, "tensor", None),
        "layers.attn.out": P(None, "tensor", None, WIDTH),
        "layers.attn.q": P(None, WIDTH, "tensor", None),
        "layers.attn.v": P(None, WIDTH, "tensor", None),
        "layers.mlp.down": P(None, "tensor", WIDTH),
        "layers.mlp.gate": P(None, WIDTH, "tensor"),
        "layers.mlp.up": P(None, WIDTH, "tensor"),
        "layers.post_attn_norm.scale": P(None, None),
        "layers.post_mlp_norm.scale": P(None, None),
        "layers.pre_attn_norm.scale": P(None, None),
        "layers.pre_mlp_norm.scale": P(None, None),
    }
    soft = mesh_lib.parameters(
        mesh_lib.make(TENSOR), {"soft_tokens": jax.ShapeDtypeStruct((3, 32), np.float32)}, AXES
    )
    assert soft["soft_tokens"].spec == P(None, WIDTH)


def placed(mesh, shapes):
    """Shapes of parameters with their shardings."""

    def one(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, mesh_lib.parameters(mesh, shapes, PARAM_AXES))


def test_rows_lie_on_data_and_fsdp_and_a_replica_is_whole():
    mesh, x = mesh_lib.make(TENSOR), np.arange(32).reshape(8, 4)
    rows = jax.device_put(x, mesh_lib.rows(mesh))
    whole = jax.device_put(x, mesh_lib.replicated(mesh))
    assert {s.data.shape for s in rows.addressable_shards} == {(2, 4)}
    assert {s.data.shape for s in whole.addressable_shards} == {(8, 4)}


def test_optimizer_leaves_lie_as_what_they_have_of_their_parameter():
    mesh = mesh_lib.make(TENSOR)
    shapes = {
        "gate": jax.ShapeDtypeStruct((3, 256, 128), np.float32),
        "scale": jax.ShapeDtypeStruct((3, 256), np.float32),
    }
    trainable = placed(mesh, shapes)
    _, moments, _ = mesh_lib.optimizer_state(mesh, optax.adamw(1e-3), trainable)[0]
    assert {name: leaf.sharding.spec for name, leaf in moments.items()} == {
        "gate": P(None, WIDTH, "tensor"),
        "scale": P(None, None),
    }

    state = mesh_lib.optimizer_state(mesh, optax.scale_by_factored_rms(), trainable)
    assert state.v_row["gate"].shape == (3, 128) and state.v_row["gate"].sharding.spec == P(
        None, "tensor"
    )
    assert state.v_col["gate"].shape == (3, 256) and state.v_col["gate"].sharding.spec == P(
        None, WIDTH
    )
    assert state.v["scale"].sharding.spec == P(None, None)
    for whole in (state.count, state.v["gate"], state.v_row["scale"]):
        assert whole.sharding.is_fully_replicated


def test_constrain_places_activations():
    place = mesh_lib.constrain(mesh_lib.make(TENSOR))
    y = jax.jit(lambda x: place(x * 2, ("batch", "traces", None, "ffn")))(
        np.ones((4, 3, 2, 6), np.float32)
    )
    assert {s.data.shape for s in y.addressable_shards} == {(1, 3, 2, 3)}


def test_table_names_every_parameter_once():
    shapes = folder.shapes(SIZES["gemma2_test"])
    table = mesh_lib.table(placed(mesh_lib.make(sizes(data=-1)), shapes))
    lines = [line.split() for line in table.splitlines()]
    assert len(lines) == len(jax.tree.leaves(shapes))
    assert ["layers.mlp.down", "4x48x32", "P(None,", "'tensor',", "('fsdp',", "'traces'))"] in lines


@pytest.mark.parametrize(
    "dtype, shape",
    [
        *((dtype, {"tensor": 2}) for dtype in DTYPES),  # nothing to gather
        *((dtype, {"data": 2}) for dtype in DTYPES),
        *((dtype, {"data": 2, "fsdp": 2, "traces": 2}) for dtype in DTYPES),
        # in bfloat16 `plan.check_dtype` refuses it on CPUs
        (jnp.float32, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_a_product_on_a_mesh_equals_that_on_one_device(dtype, shape):
    """The product and both gradients, with sums over devices in bfloat16 too."""
    mesh = mesh_lib.make(shape, jax.devices()[: math.prod(shape.values())])
    x_BMSD = jax.random.normal(jax.random.key(0), (4, 2, 3, 8), dtype)
    w_DF = jax.random.normal(jax.random.key(1), (8, 6), dtype)
    w_axes = ("embed", "ffn")
    where = NamedSharding(mesh, mesh_lib.spec(w_axes, mesh_lib.WEIGHTS))

    def on_mesh(x_BMSD, w_DF):
        return mesh_lib.product(mesh)(x_BMSD, w_DF, TRACES, w_axes, FEATURES)

    def alone(x_BMSD, w_DF):
        return jnp.einsum("BMSD,DF->BMSF", x_BMSD, w_DF)

    def with_gradients(multiply, w_DF):
        out_BMSF, back = jax.vjp(jax.jit(multiply), x_BMSD, w_DF)
        return out_BMSF, *back(jnp.ones_like(out_BMSF))

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for found, wanted in zip(
        with_gradients(on_mesh, jax.device_put(w_DF, where)), with_gradients(alone, w_DF)
    ):
        assert found.dtype == dtype
        found, wanted = (np.asarray(each, np.float32) for each in (found, wanted))
        np.testing.assert_allclose(
            found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )

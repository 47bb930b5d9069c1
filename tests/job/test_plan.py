"""A job's plan: where every array lies, and what a step moves between devices."""

import dataclasses

import jax
import pytest

from latent_delib.errors import UserError
from latent_delib.job import estimate, experiment, parameters
from latent_delib.job import plan as planning
from tests.golden import make_sharding
from tools import collectives


@pytest.mark.parametrize("name", make_sharding.NAMES)
def test_where_everything_lies_in_the_published_settings(name):
    """After a change on purpose: python -m tests.golden.make_sharding, and read the difference."""
    table = make_sharding.table(name)
    assert table == make_sharding.path(name).read_text()
    # weights and moments, step and counts, frozen weights, batch
    assert table.count("\n") == 3 * 13 + 3 + 13 + 2


def test_whatever_is_large_is_split_over_all_devices(make_config):
    plan = planning.make(
        experiment.read(
            make_config({"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2})
        )
    )
    for leaf in jax.tree.leaves((plan.state, plan.frozen)):
        if leaf.size > 500:  # norms are smaller
            part = leaf.sharding.shard_shape(leaf.shape)
            assert leaf.size == 8 * jax.numpy.prod(jax.numpy.array(part)), leaf


def test_every_setting_of_the_objective_comes_from_the_config(make_config):
    """None is left at its default: a forgotten one would train another loss in silence."""
    changes = {"seed": 3, "train.accumulation": 2, "method.max_delay": 2}
    changes |= {"method.distill": 0.5, "method.prompt_end": "Answer:"}
    found = planning.objective(experiment.read(make_config(changes)))
    for field in dataclasses.fields(found):
        assert getattr(found, field.name) != field.default, field.name


@pytest.mark.parametrize("change", [{}, {"method.lora_rank": 2, "method.start": "trained"}])
def test_frozen_parameters_lie_where_the_plan_says(make_config, trained, change):
    """The decoder, and the coprocessor under adapters, in the dtype of the computation."""
    if change:
        change = change | {"method.start": f"{trained}/checkpoints/4"}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    exp = experiment.read(make_config(mesh | change | {"compute.dtype": "bfloat16"}))
    planned = planning.make(exp).frozen
    loaded = parameters.load_frozen(exp)
    assert loaded.keys() == ({"decoder", "coprocessor"} if change else {"decoder"})

    def described(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding

    assert jax.tree.map(described, loaded) == jax.tree.map(described, planned)


def traffic(exp):
    plan = planning.make(exp)
    text = plan.step.lower(plan.state, plan.frozen, plan.batch).compile().as_text()
    return plan, {kind: t.received for kind, t in collectives.collectives(text).items()}


@pytest.mark.parametrize(
    "mesh, parts",
    [
        ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.traces": 2}, 2),
        pytest.param({"mesh.data": 1, "mesh.fsdp": 8}, 1, marks=pytest.mark.slow),
    ],
)
def test_what_a_step_moves(make_config, mesh, parts):
    """Layers once for each use, the token table once per step, gradients once per part; no more.

    The uses are the text, coprocessor and decoder forward, and both backward, where weights are
    gathered again. Of the last layer the text uses only the matrices of keys and values.
    """
    rows = {"train.accumulation": parts, "train.batch_size": 16}
    exp = experiment.read(make_config(mesh | rows | {"compute.remat": "full"}))
    plan, received = traffic(exp)
    layers = plan.state.trainable["coprocessor"]["layers"]
    matrices = 4 * sum(x.size for x in jax.tree.leaves(layers) if x.ndim > 2)
    table = planning.size(plan.frozen["decoder"]["embedding"])
    data = plan.batch["tokens"].sharding.mesh.shape["data"]
    split = 8 // data  # devices that share the weights
    assert received["reduce-scatter"] == (split - 1) / split * matrices * parts
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    of_a_layer = {path[-1].key: x.size // x.shape[0] for path, x in leaves}
    beyond_cache = 4 * sum(of_a_layer[name] for name in ("q", "out", "gate", "up", "down"))
    used = 5 * matrices - beyond_cache
    gathers = (split - 1) / split * (used * parts + table)
    # Those matrices XLA may gather once for all parts. Soft tokens and trace positions are small.
    keys_and_values = 4 * (of_a_layer["k"] + of_a_layer["v"])
    least = gathers - (split - 1) / split * keys_and_values * (parts - 1)
    assert least < received["all-gather"] < 1.03 * gathers
    sums = 2 * (data - 1) / data * matrices / split * parts
    assert sums <= received["all-reduce"] < sums + 0.1 * matrices  # over data; and norms
    assert sum(received.values()) < 1.01 * sum(
        received[k] for k in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert estimate.received(exp) == gathers + received["reduce-scatter"] + sums


@pytest.mark.slow
def test_the_sums_of_a_trained_table_do_not_grow_with_the_chunks(make_config):
    """A device adds up its own gradient over all chunks of the loss before it sends any of it."""

    def summed(chunk):
        mesh = {"mesh.data": 4, "mesh.fsdp": 2, "train.batch_size": 8}
        change = {"method.name": "decoder", "compute.loss_chunk": chunk}
        return traffic(experiment.read(make_config(mesh | change)))[1]["all-reduce"]

    assert summed(2) == summed(64)


@pytest.mark.parametrize("key, value", [("method.num_traces", 3), ("evaluate.positions", 7)])
def test_traces_must_split(make_config, key, value):
    with pytest.raises(
        UserError, match=f"config.mesh.traces=2 does not divide config.{key}={value}"
    ):
        experiment.read(make_config({"mesh.data": 4, "mesh.traces": 2, key: value}))


def test_what_a_mesh_of_cpus_cannot_do(make_config):
    """bfloat16 sums with heads left to the compiler abort the process: refused before."""
    mesh = {"mesh.data": 4, "mesh.tensor": 2}
    exp = experiment.read(make_config(mesh | {"compute.dtype": "bfloat16"}))
    with pytest.raises(
        UserError,
        match="config.compute.dtype=bfloat16 with config.mesh.tensor=2: .* expected float32",
    ):
        planning.compile_step(exp, planning.make(exp))
    with pytest.raises(UserError, match="batch_size=6 in 1 parts .* expected a multiple of 4"):
        planning.make(experiment.read(make_config(mesh | {"train.batch_size": 6})))

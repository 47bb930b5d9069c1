"""Checkpoints of small trees: whole or absent, on any mesh, with or without the optimizer."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.checkpoint import Checkpoints, open_for_reading
from latent_delib.errors import UserError

TX = optax.adam(1e-3)


def sharding(*shape):
    """Columns on the second axis of a mesh of this shape."""
    return NamedSharding(Mesh(np.asarray(jax.devices()).reshape(shape), ("a", "b")), PartitionSpec(None, "b"))


def make(seed, place):
    """A trainable tree and an optimizer state with something in it."""
    key = jax.random.key(seed)
    tree = {"coprocessor": {"w": jax.random.normal(key, (4, 8)), "soft_tokens": jnp.full((2, 8), seed, jnp.bfloat16)}}
    tree = jax.device_put(tree, place)
    _, state = TX.update(jax.tree.map(jnp.cos, tree), TX.init(tree), tree)
    whole = NamedSharding(place.mesh, PartitionSpec())
    return tree, jax.tree.map(lambda x: jax.device_put(x, place if x.ndim else whole), state)


def wanted(tree, place):
    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if x.ndim else whole), tree)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path):
    """A workdir with steps 2 and 4, each of its own values."""
    checkpoints = Checkpoints(str(tmp_path))
    for step in (2, 4):
        checkpoints.save(step, *make(step, sharding(4, 2)), {"step": step, "config": {"seed": 3}})
    checkpoints.close()
    return tmp_path


def test_round_trip_onto_the_same_and_another_mesh(saved):
    for place in (sharding(4, 2), sharding(1, 8)):
        checkpoints = Checkpoints(str(saved))
        tree, state = make(4, sharding(4, 2))
        restored = checkpoints.restore(4, wanted(tree, place), wanted(state, place))
        assert_equal(restored, (tree, state))
        for leaf in jax.tree.leaves(restored):
            assert not leaf.ndim or leaf.sharding == place
        checkpoints.close()


def test_the_trainable_tree_alone(saved):
    shutil.rmtree(saved / "checkpoints" / "4" / "optimizer")  # it is not even looked at
    checkpoints, step, meta = open_for_reading(str(saved))
    tree, _ = make(4, sharding(4, 2))
    assert (step, meta) == (4, {"step": 4, "config": {"seed": 3}})
    restored, optimizer = checkpoints.restore(4, wanted(tree, sharding(1, 8)))
    assert optimizer is None
    assert_equal(restored, tree)


def test_shapes_need_not_be_known(saved):
    checkpoints, step, _ = open_for_reading(str(saved), step=2)
    restored = checkpoints.restore_anywhere(step)
    assert_equal(restored, make(2, sharding(4, 2))[0])
    assert {x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(restored)} == {True}


def test_the_newest_are_kept(saved):
    checkpoints = Checkpoints(str(saved), keep=2)
    for step in (6, 8):
        checkpoints.save(step, *make(step, sharding(4, 2)), {"step": step})
    checkpoints.wait()
    assert checkpoints.latest() == 8
    checkpoints.close()
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["6", "8"]
    assert open_for_reading(str(saved), step=6)[2] == {"step": 6}


def test_a_half_written_checkpoint_is_ignored(saved):
    root = saved / "checkpoints"
    half = root / "6.orbax-checkpoint-tmp"
    shutil.copytree(root / "4", half)
    shutil.rmtree(half / "optimizer")
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert open_for_reading(str(saved))[1] == 4
    assert half.exists(), "a reader cleans nothing up: the job may be about to finish it"
    checkpoints = Checkpoints(str(saved))
    assert checkpoints.latest() == 4
    tree, state = make(6, sharding(4, 2))
    checkpoints.save(6, tree, state, {"step": 6})
    checkpoints.close()
    assert not half.exists()
    assert_equal(open_for_reading(str(saved))[0].restore_anywhere(6), tree)


def test_what_is_not_there_is_named(saved, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=f"{empty}.*no checkpoints"):
        open_for_reading(str(empty))
    assert not list(empty.iterdir()), "looking for a checkpoint makes nothing"
    with pytest.raises(UserError, match=r"step 3; there are \[2, 4\]"):
        open_for_reading(str(saved), step=3)
    with pytest.raises(UserError, match=r"step 0; there are \[2, 4\]"):
        open_for_reading(str(saved), step=0)

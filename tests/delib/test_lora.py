"""Adapters: nothing at the start, w + a b afterwards, and one tree laid over another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib.delib import augment, lora
from latent_delib.nn.layers import INPUT_AXES

TREE = small.decoder(small.GEMMA)


def leaves(tree, path=""):
    """Dotted name -> leaf."""
    found = {}
    for name, leaf in tree.items():
        found |= leaves(leaf, f"{path}{name}.") if isinstance(leaf, dict) else {path + name: leaf}
    return found


def adapters(rank, seed=0):
    """Both factors at random."""
    made = lora.init(jax.random.key(seed), TREE["layers"], rank)
    return {
        "layers": jax.tree.map(
            lambda x: np.asarray(jax.random.normal(jax.random.key(x.size), x.shape)), made
        )
    }


def test_every_matrix_is_adapted_and_nothing_is_changed_at_first():
    made = {"layers": lora.init(jax.random.key(0), TREE["layers"], 2)}
    matrices = [name for name in leaves(TREE) if name.split(".")[-1] in INPUT_AXES]
    assert (
        sorted(leaves(made)) == sorted(f"{name}_{part}" for name in matrices for part in "ab")
        and len(matrices) == 7
    )
    found = lora.merge(TREE, made)
    jax.tree.map(np.testing.assert_array_equal, found, TREE)
    firsts = [leaf for name, leaf in leaves(made).items() if name.endswith("_a")]
    assert all(0.7 < np.std(a) * np.sqrt(np.prod(a.shape[1:-1])) < 1.3 for a in firsts)
    assert len({float(a.ravel()[0]) for a in firsts}) == len(firsts)  # no two of the same draw


def test_an_adapted_matrix_is_that_and_the_product():
    made = adapters(3)
    found, added = leaves(lora.merge(TREE, made)), leaves(made)
    for name, leaf in leaves(TREE).items():
        if f"{name}_a" not in added:
            assert found[name] is leaf
            continue
        a, b = added[f"{name}_a"], added[f"{name}_b"]
        for layer in range(len(leaf)):
            fan_in = np.prod(a.shape[1:-1])
            change = a[layer].reshape(fan_in, 3) @ b[layer].reshape(3, -1)
            expected = leaf[layer].reshape(fan_in, -1) + change
            np.testing.assert_allclose(
                found[name][layer].reshape(expected.shape), expected, rtol=1e-5, atol=1e-5
            )


def test_what_is_below_in_bfloat16_stays_so():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), TREE)
    found = lora.merge(half, jax.tree.map(jnp.asarray, adapters(2)))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("trained", ["coprocessor", "adapters", "soft tokens", "decoder", "both"])
def test_rooms_lie_over_what_is_below(trained):
    """A coprocessor lies over the decoder as it is now: one that is trained, where that is."""
    soft, other = np.ones((2, 3)), small.decoder(small.GEMMA, 5)
    frozen, tree = {"decoder": TREE}, {}
    body = {name: TREE[name] for name in ("layers", "final_norm")}
    if trained == "coprocessor":
        tree = {"coprocessor": {name: other[name] for name in body} | {"soft_tokens": soft}}
        body = {name: other[name] for name in body}
    elif trained == "adapters":
        tree = {"coprocessor": adapters(2) | {"soft_tokens": soft}}
        body = lora.merge(body, adapters(2))
    elif trained == "soft tokens":
        tree = {"coprocessor": {"soft_tokens": soft}}
    elif trained == "decoder":
        frozen, tree = {}, {"decoder": other}
    else:
        frozen, tree = {}, {"decoder": other, "coprocessor": {"soft_tokens": soft}}
        body = {name: other[name] for name in body}
    found = augment.assemble(frozen, tree)
    jax.tree.map(np.testing.assert_array_equal, found["decoder"], tree.get("decoder", TREE))
    if trained == "decoder":
        assert set(found) == {"decoder"}
    else:
        jax.tree.map(
            np.testing.assert_array_equal, found["coprocessor"], body | {"soft_tokens": soft}
        )


def test_a_coprocessor_below_adapters_comes_before_the_decoder():
    other = small.coprocessor(small.GEMMA, 2)
    found = augment.assemble({"decoder": TREE, "coprocessor": other}, {"coprocessor": adapters(2)})
    jax.tree.map(
        np.testing.assert_array_equal, found["coprocessor"], lora.merge(other, adapters(2))
    )


def test_a_whole_coprocessor_has_nothing_of_the_decoder():
    """Its architecture may be another, without norms that the decoder has."""
    own = {"layers": {"attn": {}}, "final_norm": {}, "soft_tokens": 0}
    assert augment.assemble({"decoder": TREE}, {"coprocessor": own})["coprocessor"] is own

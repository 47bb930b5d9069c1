"""Adapters: nothing at the start, w + a b afterwards, and one tree laid over another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib.delib import augment, lora
from latent_delib.nn import layers, transformer
from latent_delib.nn.layers import INPUT_AXES
from latent_delib.nn.transformer import Transformer

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


def multiplied(base, tree):
    return lora.multiply_out(lora.join(base, tree))


def test_every_matrix_is_adapted_and_nothing_is_changed_at_first():
    made = {"layers": lora.init(jax.random.key(0), TREE["layers"], 2)}
    matrices = [name for name in leaves(TREE) if name.split(".")[-1] in INPUT_AXES]
    assert (
        sorted(leaves(made)) == sorted(f"{name}_{part}" for name in matrices for part in "ab")
        and len(matrices) == 7
    )
    found = multiplied(TREE, made)
    jax.tree.map(np.testing.assert_array_equal, found, TREE)
    firsts = [leaf for name, leaf in leaves(made).items() if name.endswith("_a")]
    assert all(0.7 < np.std(a) * np.sqrt(np.prod(a.shape[1:-1])) < 1.3 for a in firsts)
    assert len({float(a.ravel()[0]) for a in firsts}) == len(firsts)  # no two of the same draw


def test_an_adapted_matrix_is_that_and_the_product():
    made = adapters(3)
    found, added = leaves(multiplied(TREE, made)), leaves(made)
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
    found = multiplied(half, jax.tree.map(jnp.asarray, adapters(2)))
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
        body = lora.join(body, adapters(2))
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
    jax.tree.map(np.testing.assert_array_equal, found["coprocessor"], lora.join(other, adapters(2)))


def test_a_whole_coprocessor_has_nothing_of_the_decoder():
    """Its architecture may be another, without norms that the decoder has."""
    own = {"layers": {"attn": {}}, "final_norm": {}, "soft_tokens": 0}
    assert augment.assemble({"decoder": TREE}, {"coprocessor": own})["coprocessor"] is own


@pytest.mark.parametrize("config", [small.GEMMA, small.GPT2], ids=["gemma", "gpt2"])
@pytest.mark.parametrize("outputs", [True, False])
def test_adapters_beside_a_matrix_equal_the_sum(config, outputs):
    """The layers' products, forward and gradient, against weights that are multiplied out."""
    tree = {name: x for name, x in small.decoder(config).items() if name != "embedding"}
    pairs = {"layers": lora.init(jax.random.key(1), tree["layers"], 3)}
    pairs = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), pairs)
    x = jax.random.normal(jax.random.key(2), (2, 1, 9, config.embed_dim))
    position = jnp.broadcast_to(jnp.arange(9), (2, 1, 9))
    bounds = transformer.own_text(jnp.zeros((2, 9), jnp.int32))

    def total(pairs, laid):
        variables = {"params": laid(tree, pairs)}
        y, kv = Transformer(config).apply(variables, x, position, bounds, outputs=outputs)
        found = [*kv] if y is None else [y, *kv]
        return sum(jnp.sum(jnp.sin(part)) for part in found), found

    with jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
        beside, summed = grad(pairs, lora.join), grad(pairs, multiplied)
    for ours, expected in zip(jax.tree.leaves(beside), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(beside[0])) > 0.1


def test_adapters_of_decoder_and_coprocessor_add_up():
    """`joint`: the coprocessor has those of the decoder below it, and its own."""
    first, second = adapters(2), adapters(3, seed=1)
    frozen = {"decoder": TREE}
    found = augment.assemble(frozen, {"decoder": first, "coprocessor": second})
    assert found["coprocessor"]["layers"]["attn"]["q_a"].shape[-1] == 5
    expected = leaves(multiplied(multiplied(TREE, first), second))
    for name, leaf in leaves(lora.multiply_out(found["coprocessor"])).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-5)


class One(nn.Module):
    """One product."""

    partition = layers.WHOLE

    @nn.compact
    def __call__(self, x):
        return layers.dense(self, "up", (x.shape[-1], 64), x, layers.TRACES, layers.FEATURES)


def test_a_small_change_is_not_lost_in_bfloat16():
    """Added to a matrix of bfloat16 it is: then training does not see its own first steps."""
    draw = np.random.default_rng(0)
    tree = {
        "up": draw.normal(0, 64**-0.5, (64, 64)),
        "up_a": draw.normal(0, 64**-0.5, (64, 8)),
        "up_b": draw.choice([-1e-4, 1e-4], (8, 64)),
    }
    x = draw.normal(0, 1, (1, 1, 4096, 64))
    true = (x @ tree["up_a"] @ tree["up_b"]).ravel()
    half, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (tree, x))
    plain = One().apply({"params": {"up": half["up"]}}, x)

    def kept(params):
        """The share of the change that the outputs have, by regression."""
        y = One().apply({"params": params}, x).astype(jnp.float32) - plain.astype(jnp.float32)
        return float(np.asarray(y).ravel() @ true / (true @ true))

    assert kept(half) == pytest.approx(1, abs=0.1)
    stacked = jax.tree.map(lambda leaf: leaf[None], half)
    summed = {"up": lora.multiply_out(stacked)["up"][0]}
    assert kept(summed) < 0.5

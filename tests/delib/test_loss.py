"""The chunked loss against log_softmax over the whole vocabulary."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.loss import summed_loss, token_loss
from latent_delib.nn.layers import WHOLE
from latent_delib.nn.transformer import Transformer

B, R, D, V = 2, 9, 6, 23


def inputs(size=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x, embedding = (size * jax.random.normal(k, s) for k, s in zip(keys, ((B, R, D), (V, D))))
    target = jnp.array([[0, 6, 7, 13, 14, 20, 21, 22, 22], [22, 5, 0, 0, 1, 9, 11, 3, 3]])
    return x.astype(dtype), embedding, target, jax.random.normal(keys[3], (B, R))


@functools.cache
def naive(softcap):
    """One function for each softcap, so that it is compiled once."""

    def total(x, embedding, target, weights):
        logits = x @ embedding.T
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[
            ..., 0
        ]
        return jnp.sum(losses * weights), losses

    return total


@functools.cache
def ours(softcap, chunk, shards=1):
    def total(x, embedding, target, weights):
        losses = token_loss(x, embedding, target, softcap, chunk)
        return summed_loss(x, embedding, target, weights, softcap, chunk, 0.0, None, shards), losses

    return total


@partial(jax.jit, static_argnums=0)
def value_and_grads(total, *args):
    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*args)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk, shards", [(1, 1), (4, 1), (4, B), (R, 1), (100, 1)])
def test_equals_log_softmax(chunk, shards, softcap):
    args = inputs()
    (total, losses), grads = value_and_grads(ours(softcap, chunk, shards), *args)
    (total_wanted, wanted), grads_wanted = value_and_grads(naive(softcap), *args)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, total_wanted, rtol=1e-5)
    for found, expected in zip(grads, grads_wanted):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_bfloat16_outputs_give_the_loss_of_float32(softcap):
    """Of bfloat16 outputs and a float32 table; each gradient has its argument's dtype."""
    x, embedding, target, weights = inputs(dtype=jnp.bfloat16)
    embedding = embedding.astype(jnp.bfloat16).astype(jnp.float32)
    (_, losses), grads = value_and_grads(ours(softcap, 4), x, embedding, target, weights)
    (_, wanted), grads_wanted = value_and_grads(
        naive(softcap), x.astype(jnp.float32), embedding, target, weights
    )
    assert [a.dtype for a in (losses, *grads)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    # products of bfloat16 are exact in float32
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    for found, expected in zip(grads, grads_wanted):
        atol = 2**-6 * np.abs(expected).max()
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-6, atol=atol)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_extreme_logits_are_finite_and_right(softcap):
    """Logits of some 1e5, far past what exp can hold."""
    args = inputs(size=300.0)
    (_, losses), grads = value_and_grads(ours(softcap, 4), *args)
    (_, wanted), grads_wanted = value_and_grads(naive(softcap), *args)
    assert losses.max() > (4 if softcap else 1e4)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    for found, expected in zip(grads, grads_wanted):
        assert np.all(np.isfinite(found))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("distill, softcap", [(0.3, 2.0), (1.0, 0.0)])
def test_with_a_teacher_equals_the_definition(distill, softcap):
    """Forward, and the gradients of x and of the table; none passes through the teacher."""
    x, table, target, weights = inputs()
    teacher = jax.random.normal(jax.random.key(1), x.shape)

    def log_p(x, table):
        logits = x @ table.T
        return jax.nn.log_softmax(softcap * jnp.tanh(logits / softcap) if softcap else logits)

    def definition(x, table):
        student = log_p(x, table)
        taught = jax.lax.stop_gradient(log_p(teacher, table))
        nll = -jnp.take_along_axis(student, target[..., None], axis=-1)[..., 0]
        apart = jnp.sum(jnp.exp(taught) * (taught - student), axis=-1)
        losses = (1 - distill) * nll + distill * apart
        return jnp.sum(losses * weights), losses

    def chunked(x, table, teacher):
        settings = (softcap, 4, distill, teacher)
        losses = token_loss(x, table, target, *settings)
        return summed_loss(x, table, target, weights, *settings), losses

    grad = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1, 2), has_aux=True))
    (total, losses), (*grads, through_teacher) = grad(x, table, teacher)
    (total_wanted, wanted), grads_wanted = jax.value_and_grad(definition, (0, 1), has_aux=True)(
        x, table
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, total_wanted, rtol=1e-5)
    for found, expected in zip(grads, grads_wanted):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not through_teacher.any()
    if distill == 1:  # a student that is its teacher has nothing to learn
        (_, losses), grads = grad(x, table, x)
        for found in (losses, *grads):
            np.testing.assert_allclose(found, np.zeros(found.shape), atol=1e-5)


def arrays_in(jaxpr):
    """Shapes and dtypes of everything a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_frozen_table_changes_no_gradient(softcap):
    """Of x alone, made in the forward pass: the same numbers as with the table's."""
    x, embedding, target, weights = inputs()

    def total(x, embedding):
        return summed_loss(x, embedding, target, weights, softcap, 4)

    alone = jax.jit(jax.grad(total))(x, embedding)
    both = jax.jit(jax.grad(total, argnums=(0, 1)))(x, embedding)
    np.testing.assert_allclose(alone, both[0], rtol=1e-5, atol=1e-6)
    frozen = jax.make_jaxpr(jax.grad(total))(x, embedding).jaxpr
    # no gradient of the table is made for nothing
    assert not any(a.shape == (V, D) for a in arrays_in(frozen))
    table = jax.jit(jax.grad(total, argnums=1))(x, embedding)
    np.testing.assert_allclose(table, both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distill", [0.0, 0.5])
@pytest.mark.parametrize("argnums", [0, (0, 1)])
@pytest.mark.parametrize("chunk, whole", [(4, False), (R, True)])
def test_no_logits_of_all_tokens(chunk, whole, argnums, distill):
    x, embedding, target, weights = inputs()
    teacher = x + 1 if distill else None

    def total(x, embedding):
        return summed_loss(x, embedding, target, weights, 2.0, chunk, distill, teacher)

    program = jax.make_jaxpr(jax.value_and_grad(total, argnums))(x, embedding)
    floats = [a.shape for a in arrays_in(program.jaxpr) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert (B, chunk, V) in floats  # a chunk's are seen, so the walk goes in
    assert any(np.prod(shape) >= B * R * V and V in shape for shape in floats) == whole


@pytest.mark.parametrize("shards, tokens", [(1, 8), (4, 32)])
def test_logits_at_a_time_do_not_grow_with_the_batch(shards, tokens):
    """Of 128 sequences on `shards` devices: four times the chunk on each."""
    config, chunk, sequences = small.GEMMA, 256, 128
    aug = Augmentation(
        Transformer(config, partition=WHOLE._replace(row_shards=shards)), loss_chunk=chunk
    )
    x = jax.ShapeDtypeStruct((sequences, 1, 300, config.embed_dim), jnp.float32)
    table = jax.ShapeDtypeStruct((config.vocab_size, config.embed_dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((sequences, 1, 300), jnp.int32)

    def total(x, table, targets):
        return augment.training_loss(
            aug, {"decoder": {"embedding": table}}, x, targets, jnp.ones(targets.shape)
        )

    for program in (total, jax.grad(total), jax.grad(total, argnums=(0, 1))):
        shapes = (a.shape for a in arrays_in(jax.make_jaxpr(program)(x, table, targets).jaxpr))
        logits = [shape for shape in shapes if shape[-1:] == (config.vocab_size,)]
        assert max(logits, key=np.prod) == (sequences, tokens, config.vocab_size)
    assert sequences * tokens == 4 * chunk * shards

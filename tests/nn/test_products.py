"""The precision that a loss and its gradients ask of the platform, in the lowered program."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment, lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.nn import layers, transformer
from latent_delib.nn.products import FEW_FOR_TABLE, FEW_FOR_WEIGHT, einsum, matmul, table_product
from latent_delib.nn.transformer import Transformer

CONFIG, KEY, L, A = small.GEMMA, jax.random.key(0), 2, 3


def asked(lowered, of: str) -> set[str]:
    """The precisions of all products in a program whose operands have this dtype: f32 or bf16."""
    products = re.findall(r"stablehlo\.dot_general .*", lowered.as_text())
    found = set()
    for line in products:
        x, y = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line).groups()
        assert {x, y} <= {"f32", "bf16"}
        if of == ("f32" if "f32" in (x, y) else "bf16"):
            found |= set(re.search(r"precision = \[(\w+), (\w+)\]", line).groups())
    return found


def loss(params, aug, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    decoder = lora.join(params["decoder"], params.get("adapters", {}))
    tokens, at = jnp.zeros((2, 40), jnp.int32), jnp.zeros((2, 8), jnp.int32)
    return augment.loss(aug, params | {"decoder": decoder}, tokens, tokens + 1, at, A)[0]


@pytest.mark.parametrize("method, form", [("resized", "xla"), ("decoder", "reference")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_product_has_the_precision_of_its_operands(method, form, dtype, monkeypatch):
    monkeypatch.setattr(layers, "FEW", 0)
    model = Transformer(CONFIG, form=form)
    aug = Augmentation(model, method, L if METHODS[method].write else 0)
    decoder = jax.eval_shape(partial(transformer.init, config=CONFIG), KEY)
    tree = jax.eval_shape(
        lambda key, decoder: METHODS[method].init(key, decoder, aug), KEY, decoder
    )
    adapters = jax.eval_shape(partial(lora.init, rank=2), KEY, decoder)
    params = {"decoder": decoder, "adapters": adapters} | tree
    lowered = jax.jit(jax.grad(partial(loss, aug=aug, dtype=jnp.dtype(dtype)))).lower(params)
    if dtype == "float32":
        assert asked(lowered, "f32") == {"HIGHEST"}
    # Norms, and the scores of a reference that is differentiated, are of float32 in either dtype.
    assert asked(lowered, "bf16") == ({"DEFAULT"} if dtype == "bfloat16" else set())


@pytest.mark.parametrize("dtype, wanted", [("f32", "HIGHEST"), ("bf16", "DEFAULT")])
def test_and_so_on_a_mesh_and_in_logits(dtype, wanted):
    mesh = mesh_lib.make({"data": 1, "fsdp": 2}, jax.devices()[:2])
    x, w = jnp.zeros((2, 1, 4, 8)), jnp.zeros((8, 6))
    if dtype == "bf16":
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    axes = ("batch", "traces", None, None), ("embed", "ffn"), ("batch", "traces", None, "ffn")
    product = partial(mesh_lib.product(mesh), x_axes=axes[0], w_axes=axes[1], y_axes=axes[2])
    assert asked(jax.jit(product).lower(x=x, w=w), dtype) == {wanted}
    logits = partial(transformer.unembed, config=CONFIG)
    assert asked(jax.jit(logits).lower(w.T, x), dtype) == {wanted}


def test_an_operand_of_less_is_not_the_precision_of_the_other():
    """A product of bfloat16 with float32 is one of float32."""
    x, y = jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((3, 4))
    assert asked(jax.jit(partial(einsum, "ab,bc->ac")).lower(x, y), "f32") == {"HIGHEST"}
    assert einsum("ab,bc->ac", x, x.T, jnp.float32).dtype == jnp.float32


def check_same(product, wanted, *operands):
    """Compares two products and both gradients of each."""
    y, back = jax.vjp(product, *operands)
    wanted_y, wanted_back = jax.vjp(wanted, *operands)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=1e-5)
    change = jax.random.normal(KEY, y.shape)
    for one, other in zip(back(change), wanted_back(change), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("contracted, shape", [(1, (4, 5)), (1, (4, 2, 5)), (2, (3, 4, 5))])
@pytest.mark.parametrize("rows", [(2, 24), (2, 6)])
def test_a_flat_product_is_the_same(rows, contracted, shape):
    """Many rows, and few."""
    assert (np.prod(rows) in FEW_FOR_WEIGHT) == (rows == (2, 6))
    x_key, w_key = jax.random.split(KEY)
    x = jax.random.normal(x_key, (*rows, *shape[:contracted]))
    w = jax.random.normal(w_key, shape)
    inputs, outputs = "XY"[:contracted], "OP"[: w.ndim - contracted]
    wanted = partial(einsum, f"BM{inputs},{inputs}{outputs}->BM{outputs}")
    for flat in (False, True):
        check_same(partial(matmul, contracted=contracted, flat=flat), wanted, x, w)


@pytest.mark.parametrize("rows", [(2, 24), (2, 6), (3,), (1,)])
def test_a_product_with_a_table_is_the_same(rows):
    assert (np.prod(rows) in FEW_FOR_TABLE) == (rows in [(2, 6), (3,)])
    x_key, table_key = jax.random.split(KEY)
    x = jax.random.normal(x_key, (*rows, 4))
    table = jax.random.normal(table_key, (5, 4))
    check_same(table_product, partial(einsum, "...D,VD->...V"), x, table)


@pytest.mark.parametrize("platform, table_first", [("cpu", True), ("cuda", False), ("tpu", False)])
def test_chips_compute_the_usual_product(platform, table_first):
    traced = jax.jit(table_product).trace(jnp.zeros((8, 4)), jnp.zeros((5, 4)))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    [product] = re.findall(r"stablehlo\.dot_general .*", lowered)
    assert ("(tensor<5x4xf32>, tensor<8x4xf32>)" in product) == table_first

"""The dense one-sequence form computes what the package computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from benchmarks import dense
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.nn import layers
from latent_delib.nn.transformer import Transformer


@pytest.mark.parametrize(
    "name, placement",
    [
        ("gemma", "after"),
        pytest.param("gemma", "overlay", marks=pytest.mark.slow),
        pytest.param("llama", "after", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_equal_ours(name, placement, monkeypatch):
    monkeypatch.setattr(layers, "FEW", 0)
    config = small.CONFIGS[name]
    params = jax.tree.map(
        jnp.array, {"decoder": small.decoder(config), "coprocessor": small.coprocessor(config, 3)}
    )
    tokens_BT, segment_BT, at_BM = jax.tree.map(jnp.array, small.packed(config))
    aug = Augmentation(Transformer(config), num_latents=3, placement=placement)

    def value_and_gradient(loss):
        def of_coprocessor(trainable):
            all_params = params | {"coprocessor": trainable}
            return loss(aug, all_params, tokens_BT, segment_BT, at_BM, num_ahead=5)

        return jax.jit(jax.value_and_grad(of_coprocessor, has_aux=True))(params["coprocessor"])

    (ours, tokens), gradient = value_and_gradient(augment.loss)
    (theirs, theirs_tokens), theirs_gradient = value_and_gradient(dense.loss)
    assert tokens == theirs_tokens and 25 < tokens < 50
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(gradient))
    assert largest > 0.1
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * largest)
    jax.tree.map(close, theirs_gradient, gradient)

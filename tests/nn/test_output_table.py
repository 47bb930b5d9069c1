"""The table that gives the logits, head or token embeddings, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import small

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.nn import transformer
from latent_delib.nn.sizes import ADDED_LATER
from latent_delib.nn.transformer import Transformer

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))


def test_gradients_of_both_tables_are_those_of_plain_autodiff():
    """`delib.loss` makes the gradient of the table that gives the logits, and of no other."""
    config = small.LLAMA
    aug = Augmentation(Transformer(config), "decoder", 0, loss_chunk=5)
    decoder = small.decoder(config)
    assert config.untied_head and "head" in decoder
    segment = np.ones_like(TOKENS)

    def ours(decoder):
        return augment.loss(aug, {"decoder": decoder}, TOKENS, segment, None, 0)[0]

    def plain(decoder):
        text = augment.read_text(aug, {"decoder": decoder}, TOKENS, segment)
        logits = transformer.unembed(decoder["head"], text.outputs[:, :-1], config)
        return -jnp.sum(
            jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
        )

    found, wanted = (jax.jit(jax.grad(loss))(decoder) for loss in (ours, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, wanted)
    assert np.any(found["head"]) and np.any(found["embedding"])


def test_a_head_of_its_own_leaves_the_other_leaves_as_they_were_drawn():
    """Random decoders of old runs stay what they are."""
    tied = small.GEMMA
    untied = type(tied).from_dict(tied.to_dict() | {"untied_head": True}, "x")
    one, two = (
        jax.jit(transformer.init, static_argnums=1)(jax.random.key(3), config)
        for config in (tied, untied)
    )
    assert two.pop("head").shape == two["embedding"].shape
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_later_fields_are_written_only_where_they_say_something():
    assert not set(ADDED_LATER) & small.GEMMA.to_dict().keys()
    assert small.LLAMA.to_dict()["untied_head"] is small.LLAMA.to_dict()["qkv_bias"] is True
    assert type(small.LLAMA).from_dict(small.LLAMA.to_dict(), "x") == small.LLAMA

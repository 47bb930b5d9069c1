"""The PyTorch peer computes what the package computes.

flex_attention has no backward pass on a CPU, so gradients are compared with plain operations under
the very same mask functions, and flex_attention itself by its loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import base
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.nn.transformer import Transformer

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")


CONFIG, L, A = small.GEMMA, 3, 5
OPTIMIZER = base.get_config().optimizer
TEXT = small.packed(CONFIG)


def ours(placement):
    """Σ loss, Σ tokens, the gradient of the coprocessor, and the two trees."""
    decoder, coprocessor = small.decoder(CONFIG), small.coprocessor(CONFIG, L)
    aug = Augmentation(Transformer(CONFIG), num_latents=L, placement=placement)

    def of_coprocessor(trainable):
        params = {"decoder": jax.tree.map(jnp.array, decoder), "coprocessor": trainable}
        return augment.loss(aug, params, *map(jnp.array, TEXT), num_ahead=A)

    (loss, count), gradient = jax.jit(jax.value_and_grad(of_coprocessor, has_aux=True))(coprocessor)
    return float(loss), float(count), jax.device_get(gradient), decoder, coprocessor


def theirs(placement, decoder, coprocessor, device="cpu", **settings):
    """The peer with the same weights, and its arguments."""
    from benchmarks.peer_steps import Peer
    from benchmarks.peer_torch import load

    peer = Peer(CONFIG, L, A, placement, OPTIMIZER, device, **settings)
    load(peer.decoder, decoder)
    load(peer.coprocessor, coprocessor)
    return peer, [torch.from_numpy(x).to(device) for x in TEXT]


def assert_equal(found, expected):
    """Gradients of the same kind of parameter."""
    assert abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize(
    "placement, compiled",
    [("after", False), ("overlay", False), pytest.param("overlay", True, marks=pytest.mark.slow)],
)
def test_loss_and_gradient_equal_ours(placement, compiled):
    from benchmarks.peer_torch import FORMS

    expected_loss, count, gradient, *trees = ours(placement)
    peer, text = theirs(placement, *trees, compiled=compiled, checkpointed=not compiled)
    loss, tokens = peer.loss(*text)
    assert tokens == count > 25
    np.testing.assert_allclose(loss.detach(), expected_loss, rtol=1e-4)
    loss.backward()
    assert all(p.grad is None for p in peer.decoder.parameters())
    assert_equal(peer.coprocessor.soft_tokens.grad, gradient["soft_tokens"])
    assert_equal(
        peer.coprocessor.layers[1].mlp.gate_proj.weight.grad, gradient["layers"]["mlp"]["gate"][1].T
    )
    assert_equal(
        peer.coprocessor.layers[2].post_attn_norm.weight.grad,
        gradient["layers"]["post_attn_norm"]["scale"][2],
    )

    flex, text = theirs(placement, *trees, compiled=False, form=FORMS["cuda"])  # in float32
    with torch.no_grad():
        np.testing.assert_allclose(flex.loss(*text)[0], expected_loss, rtol=1e-4)


def test_a_decoder_s_loss_and_gradient_equal_ours():
    from benchmarks.peer_steps import DecoderPeer
    from benchmarks.peer_torch import load

    decoder = small.decoder(CONFIG)
    aug = Augmentation(Transformer(CONFIG), "decoder", num_latents=0)

    def of_decoder(tree):
        return augment.loss(aug, {"decoder": tree}, *map(jnp.array, TEXT), num_ahead=A)

    (expected_loss, count), gradient = jax.jit(jax.value_and_grad(of_decoder, has_aux=True))(
        decoder
    )
    peer = DecoderPeer(CONFIG, OPTIMIZER, compiled=False)
    load(peer.decoder, decoder)
    loss, tokens = peer.loss(*map(torch.from_numpy, TEXT[:2]))
    assert int(tokens) == int(count) > 50
    np.testing.assert_allclose(loss.detach(), expected_loss, rtol=1e-4)
    loss.backward()
    assert_equal(peer.decoder.embedding.grad, np.asarray(gradient["embedding"]))
    assert_equal(
        peer.decoder.layers[1].mlp.gate_proj.weight.grad,
        np.asarray(gradient["layers"]["mlp"]["gate"][1].T),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_as_it_is_timed(placement):
    """Compiled, checkpointed, flex_attention, bfloat16: near what float32 gives."""
    expected_loss, _, gradient, *trees = ours(placement)
    peer, text = theirs(placement, *trees, device="cuda", compiled=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = peer.loss(*text)
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected_loss, rtol=0.03)
    found, expected = peer.coprocessor.soft_tokens.grad.cpu().numpy(), gradient["soft_tokens"]
    assert np.sum(found * expected) > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)


def test_a_step_moves_the_coprocessor_alone():
    from benchmarks.peer_steps import Peer

    peer = Peer(CONFIG, L, A, "after", OPTIMIZER, "cpu", compiled=False, checkpointed=False)
    before = [[p.clone() for p in m.parameters()] for m in (peer.decoder, peer.coprocessor)]
    segment = torch.ones(2, 40, dtype=torch.long)
    losses = [
        float(peer.step(torch.arange(80).view(2, 40), segment, num_traces=4)) for _ in range(30)
    ]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(before[0], peer.decoder.parameters()))
    assert not any(torch.equal(p, q) for p, q in zip(before[1], peer.coprocessor.parameters()))

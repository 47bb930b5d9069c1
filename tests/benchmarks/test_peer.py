"""The PyTorch peer computes what the package computes.

flex_attention has no backward pass on a CPU, so gradients are compared with plain attention under the very same mask
functions, and flex_attention itself by its loss.
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
        return augment.loss(aug, params, *map(jnp.array, TEXT), num_ahead=A, dtype=jnp.float32)

    (loss, count), gradient = jax.jit(jax.value_and_grad(of_coprocessor, has_aux=True))(coprocessor)
    return float(loss), float(count), jax.device_get(gradient), decoder, coprocessor


def theirs(placement, decoder, coprocessor, device, compiled):
    """The peer with the same weights, and its arguments."""
    from benchmarks.peer_torch import Peer, load

    peer = Peer(CONFIG, L, A, placement, OPTIMIZER, device, compiled)
    load(peer.decoder, decoder)
    load(peer.coprocessor, coprocessor)
    return peer, [torch.from_numpy(x).to(device) for x in TEXT]


@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_loss_and_gradient_equal_ours(placement):
    expected_loss, count, gradient, *trees = ours(placement)
    peer, text = theirs(placement, *trees, "cpu", compiled=False)
    loss, tokens = peer.loss(*text)
    assert tokens == count > 25
    np.testing.assert_allclose(loss.detach(), expected_loss, rtol=1e-4)
    loss.backward()
    assert all(p.grad is None for p in peer.decoder.parameters())
    for found, expected in (
        (peer.coprocessor.soft_tokens, gradient["soft_tokens"]),
        (peer.coprocessor.layers[1].mlp.gate_proj.weight, gradient["layers"]["mlp"]["gate"][1].T),
        (peer.coprocessor.layers[2].post_attn_norm.weight, gradient["layers"]["post_attn_norm"]["scale"][2]),
    ):
        assert abs(expected).max() > 0.1
        np.testing.assert_allclose(found.grad, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())

    peer.flex = True  # block masks, in float32
    with torch.no_grad():
        np.testing.assert_allclose(peer.loss(*text)[0], expected_loss, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_as_it_is_timed(placement):
    """Compiled, checkpointed, flex_attention, bfloat16: near what float32 gives."""
    expected_loss, _, gradient, *trees = ours(placement)
    peer, text = theirs(placement, *trees, "cuda", compiled=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = peer.loss(*text)
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected_loss, rtol=0.03)
    found, expected = peer.coprocessor.soft_tokens.grad.cpu().numpy(), gradient["soft_tokens"]
    assert np.sum(found * expected) > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)


def test_a_step_moves_the_coprocessor_alone():
    from benchmarks.peer_torch import Peer

    peer = Peer(CONFIG, L, A, "after", OPTIMIZER, "cpu", compiled=False, checkpointed=False)
    before = [[p.clone() for p in m.parameters()] for m in (peer.decoder, peer.coprocessor)]
    segment = torch.ones(2, 40, dtype=torch.long)
    losses = [float(peer.step(torch.arange(80).view(2, 40), segment, num_traces=4)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(before[0], peer.decoder.parameters()))
    assert not any(torch.equal(p, q) for p, q in zip(before[1], peer.coprocessor.parameters()))

"""Looks into latents: attention weights against the naive reading, and words near to latents."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.lm import look
from latent_delib.nn.transformer import Transformer

AT, LENGTH, L = 6, 12, 3


@pytest.fixture(scope="module")
def decoder(decoder_folder):
    return ld.load_decoder(str(decoder_folder))


@pytest.fixture(scope="module")
def tokens(decoder, texts):
    return [decoder.tokenizer.bos_id, *decoder.tokenizer.encode(max(texts["validation"], key=len))][
        :LENGTH
    ]


@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_attention_is_that_of_the_naive_reading(decoder, tokens, placement, monkeypatch):
    """A coprocessor unlike the decoder; the weights are those of the oracle's own softmax."""
    coprocessor = ld.init_coprocessor(decoder, L, placement)
    params = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape), coprocessor.params
    )
    lm = ld.AugmentedLM(decoder, dataclasses.replace(coprocessor, params=params))
    written, decoded = look.attention(lm, tokens, AT)

    seen, softmax = [], naive.softmax
    monkeypatch.setattr(naive, "softmax", lambda x: seen.append(softmax(x)) or seen[-1])
    c = decoder.config
    naive.trace_nll(c, decoder.params, params, np.array(tokens), AT, LENGTH - 1 - AT, placement)
    every = c.num_layers * c.num_heads
    coprocessor_call, decoder_call = (
        np.stack(call).reshape(c.num_layers, c.num_heads, *call[0].shape)
        for call in (seen[:every], seen[every:-1])
    )

    np.testing.assert_allclose(
        written.weights, coprocessor_call[:, :, AT + 1 :], rtol=1e-3, atol=1e-5
    )
    # Where token AT is read again, nobody sees it in the cache.
    kept = AT if naive.REREADS[placement] else AT + 1
    ours = np.delete(decoded.weights, np.arange(kept, AT + 1), axis=-1)
    np.testing.assert_allclose(ours, decoder_call[:, :, kept:], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(decoded.weights.sum(-1), 1, rtol=1e-5)

    words = [f"{i} {word}" for i, word in enumerate(look.words(lm, tokens))]
    assert written.rows == ["z1", "z2", "z3"] and written.columns == words[: AT + 1] + written.rows
    assert (
        decoded.rows == written.rows + words[kept:-1]
        and decoded.columns == words[: AT + 1] + decoded.rows
    )
    assert written.text == decoded.text == AT + 1


def test_a_method_without_a_coprocessor(decoder, tokens):
    soft = METHODS["pause_tokens"].init(jax.random.key(0), decoder.params, None)["coprocessor"]
    start = small.with_method(ld.init_coprocessor(decoder, L), name="pause_tokens")
    lm = ld.AugmentedLM(decoder, dataclasses.replace(start, params=soft))
    written, decoded = look.attention(lm, tokens, AT)
    assert written is None and decoded.weights.shape[-2:] == (
        LENGTH - AT - 2 + L,
        AT + 1 + LENGTH - AT - 2 + L,
    )


# Without a coprocessor, or with one that is called in a loop.
IN_ONE_CALL = {"pause_tokens", "static_tokens", "latent_tokens", "cartridge"}
IN_ONE_CALL |= {"feedback", "sequential"}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.write])
def test_the_calls_of_every_method(decoder, name):
    """Traced only: the coprocessor's call outside of loops, if any, and the decoder's."""
    method, model = METHODS[name], Transformer(decoder.config)
    own = (
        Transformer(dataclasses.replace(decoder.config, num_layers=1)) if method.own_size else None
    )
    every = 4 if method.recurs else 0
    aug = Augmentation(model, name, L, "overlay", coprocessor=own, every=every)

    def call(key, weights):
        tree = method.init(key, weights, aug)
        params = augment.assemble({"decoder": weights, "assistant": weights}, tree)
        text = jnp.zeros((1, LENGTH), jnp.int32)
        ahead = LENGTH - 1 - AT
        return look._called(params, text, jnp.array([[AT]]), aug=aug, ahead=ahead)

    called = jax.eval_shape(call, jax.random.key(0), decoder.params)
    assert len(called) == (1 if name in IN_ONE_CALL else 2)
    latents = aug.count_latents(LENGTH - 1 - AT)
    rows, columns = called[-1].shape[-2:]
    given = L if method.writes_keys else 0
    assert columns - LENGTH == rows + given >= latents


def test_the_cache_of_a_text(decoder, tokens):
    """An entry depends on tokens up to its own alone; the public interface gives the module."""
    lm, c = ld.AugmentedLM(decoder), decoder.config
    other = [*tokens[:AT], *tokens[AT:][::-1]]
    found = ld.look.cache(lm, [tokens, other])
    assert found.k.shape == found.v.shape == (c.num_layers, 2, LENGTH, c.num_kv_heads, c.head_dim)
    np.testing.assert_array_equal(found.k[:, 0, :AT], found.k[:, 1, :AT])
    assert (found.v[:, 0, AT:] != found.v[:, 1, AT:]).any() and ld.look is look


def test_rows_that_do_not_split_over_devices(decoder, tokens):
    mesh = ld.mesh.make({"data": 2}, jax.devices()[:2])
    with pytest.raises(ld.UserError, match="tokens: 3 rows do not split over 2 devices"):
        ld.look.cache(ld.AugmentedLM(decoder, mesh=mesh), [tokens] * 3)


def test_nearest_words(decoder):
    lm = ld.AugmentedLM(decoder)
    table = np.asarray(decoder.params["embedding"], np.float64)
    z = np.stack([7 * table[300], -0.1 * table[5], np.zeros(table.shape[1])])
    near = look.nearest(lm, jnp.asarray(z, jnp.float32), count=4)
    assert near[0][0] == (look.words(lm, [300])[0], pytest.approx(1, abs=1e-5))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit @ -unit[5]
    assert [n.word for n in near[1]] == look.words(lm, np.argsort(-cosines)[:4])
    np.testing.assert_allclose([n.cosine for n in near[1]], np.sort(cosines)[::-1][:4], atol=1e-5)
    assert [n.cosine for n in near[2]] == [0] * 4  # no direction, and no division by nothing
    said = r"^z: of shape \(1, 3, 32\), expected the latents of one position, \[L, 32\]"
    with pytest.raises(ld.UserError, match=said):
        look.nearest(lm, z[None])


def test_words_that_cannot_be_read_are_numbers(decoder):
    lm = ld.AugmentedLM(decoder)
    tokenizer = decoder.tokenizer
    assert look.words(lm, [tokenizer.bos_id, tokenizer.pad_id]) == [
        f"<{tokenizer.bos_id}>",
        f"<{tokenizer.pad_id}>",
    ]
    assert "the cat".endswith(look.words(lm, tokenizer.encode("the cat"))[-1])


def test_bad_arguments_are_named(decoder, tokens):
    with pytest.raises(ld.UserError, match="no coprocessor"):
        look.attention(ld.AugmentedLM(decoder), tokens, AT)
    lm = ld.AugmentedLM(decoder, ld.init_coprocessor(decoder, L))
    for at in (-1, LENGTH - 2):
        with pytest.raises(ld.UserError, match=f"at={at}: "):
            look.attention(lm, tokens, at)
    with pytest.raises(ld.UserError, match="at=1.5: expected a whole number"):
        look.attention(lm, tokens, 1.5)
    for bad in ("the cat sat", [2, 320, 5, 6, 7], [tokens]):
        with pytest.raises(ld.UserError, match="^tokens"):
            look.attention(lm, bad, 1)
    with pytest.raises(ld.UserError, match=r"tokens: .* expected integers \[B, T\]"):
        look.cache(lm, tokens)
    for count in (0, 321):
        with pytest.raises(ld.UserError, match=f"count={count}: expected"):
            look.nearest(lm, np.ones((L, decoder.config.embed_dim)), count)

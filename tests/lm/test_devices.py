"""Models split over devices, and a coprocessor beside its decoder, against one device."""

import time
import warnings

import jax
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import mesh
from latent_delib.delib.methods import param_axes
from latent_delib.lm import batching, compiled, decoding, load
from tests.prompts import FIVE, NEW, PROMPTS, TAILS


@pytest.mark.parametrize("tails, shape", [([[3], [4, 5]], (1, 4, 8)), ([[3]], (1, 1, 8))])
def test_devices_share_the_continuations_of_a_prompt_evenly(tails, shape):
    """Or one continuation is on all of them."""
    group = batching.Group([2], list(range(len(tails))), (len(tails), 2))
    assert batching.pad_tails([group], tails, 1, 0, shards=4)[0].shape == shape


@pytest.fixture(scope="module")
def sharded(decoder, lms):
    """The model "overlay" on eight devices."""
    on = mesh.make({"data": 2, "fsdp": 2, "tensor": 2})
    return ld.AugmentedLM(decoder, lms["overlay"].coprocessor, on)


def test_sharded_decoding_equals_one_device(lms, sharded):
    options = {"every": 5, "delay": 2}
    expected = lms["overlay"].generate(PROMPTS, NEW, **options)
    assert sharded.generate(PROMPTS, NEW, **options) == expected


def test_sharded_logprobs_equal_one_device(lms, sharded):
    expected = lms["overlay"].logprobs(FIVE, TAILS)
    for ours, theirs in zip(sharded.logprobs(FIVE, TAILS), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_sharded_latents_equal_one_device(lms, sharded, text):
    where = np.concatenate([text, text]), [[3], [8]] * 2
    np.testing.assert_allclose(sharded.latents(*where), lms["overlay"].latents(*where), atol=1e-4)


def test_weights_are_split(sharded):
    out = sharded.params["decoder"]["layers"]["attn"]["out"]
    assert out.sharding.shard_shape(out.shape)[1:] == (2, 16, 16)  # of 4 heads and a width of 32


def test_the_cache_is_split(sharded):
    """By rows and heads: one of each on a device."""
    lm = sharded
    rows = lm._pad([[2, 5, 6]] * 4)
    k = compiled.prefill(lm.params, *rows, aug=lm.aug, room=32, pad_id=0)[1].cache.k
    assert k.shape[1:4:2] == (4, 2) and k.sharding.shard_shape(k.shape)[1:4:2] == (1, 1)


def test_rows_that_do_not_split_over_devices(sharded, text):
    with pytest.raises(ld.UserError, match="tokens: 3 rows do not split over"):
        sharded.logits([*text, text[0]])


@pytest.fixture(scope="module")
def two_devices(decoder, lms):
    """The model "overlay" on two devices that share the traces of a text."""
    on = mesh.make({"traces": 2}, jax.devices()[:2])
    return ld.AugmentedLM(decoder, lms["overlay"].coprocessor, on)


def test_stretches_that_devices_share(lms, two_devices):
    """Those of a long text are filled up to a number that splits."""
    long = " ".join(PROMPTS * 2)
    found = two_devices.rolling_logprobs([long], every=5)
    expected = lms["overlay"].rolling_logprobs([long], every=5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_positions_that_do_not_split_over_devices(two_devices, text):
    with pytest.raises(ld.UserError, match="positions: 3 per row do not split over 2 devices"):
        two_devices.latents(text, [[1, 2, 3]] * len(text))


def test_no_device_holds_a_whole_model(lms):
    """A checkpoint's leaves are numpy, float32: cast before they are placed, and placed once."""
    on = mesh.make({"fsdp": 8})
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), lms["overlay"].coprocessor.params)
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        placed = load.place(on, params, jax.numpy.bfloat16, param_axes("cache_augmentation"))
    found = {(x.dtype.name, len(x.sharding.device_set)) for x in jax.tree.leaves(placed)}
    assert found == {("bfloat16", 8)}


# A coprocessor on devices of its own.


@pytest.fixture(scope="module")
def beside(decoder, lms):
    """Decoder on the first device, coprocessor on the second."""
    one, other = (mesh.make({}, [device]) for device in jax.devices()[:2])
    return ld.AugmentedLM(decoder, lms["after"].coprocessor, one, other)


def test_decoder_and_coprocessor_are_on_their_devices(beside):
    first, second = jax.devices()[:2]
    assert beside.params["decoder"]["embedding"].devices() == {first}
    assert beside.params_beside["coprocessor"]["soft_tokens"].devices() == {second}


@pytest.mark.parametrize("every", [0, 5])
def test_a_coprocessor_beside_the_decoder(lms, beside, monkeypatch, every):
    """Latents that come three tokens late are those of the published simulation."""
    polls = iter(range(1, 99))

    def ready(z):
        jax.block_until_ready(z)
        return next(polls) % 4 == 0

    monkeypatch.setattr(decoding, "ready", ready)
    found = beside.continuations(PROMPTS, NEW, every=every, delay=None)
    assert {c.joined for c in found} == {(3, 8) if every else (3,)}
    assert [c.text for c in found] == lms["after"].generate(PROMPTS, NEW, every=every, delay=3)


def slowly(done):
    """Gives the coprocessor time, as `progress` of a continuation."""
    time.sleep(0.02)


def test_latents_join_when_they_are_ready(lms, beside):
    """Whenever that is, what is decoded is what the simulation decodes with that delay."""
    (found,) = beside.continuations(PROMPTS[:1], 32, delay=None, progress=slowly)
    assert len(found.joined) == 1
    assert [found.text] == lms["after"].generate(PROMPTS[:1], 32, delay=found.joined[0])


@pytest.mark.slow
def test_fewer_prompts_than_a_coprocessor_has_devices(beside):
    rows = mesh.make({"data": 4}, jax.devices()[1:5])
    split = ld.AugmentedLM(beside.decoder, beside.coprocessor, beside.mesh, rows)
    (found,) = split.continuations(PROMPTS[:1], 32, delay=None, progress=slowly)
    assert len(found.joined) == 1


@pytest.fixture(params=["fails at once", "fails later", "never answers"])
def fault(request, monkeypatch):
    """The name of a fault of coprocessors."""

    def broken(*_):
        raise RuntimeError("the slice is gone")

    if request.param == "fails at once":
        monkeypatch.setattr(decoding, "write_beside", broken)
    elif request.param == "fails later":
        monkeypatch.setattr(decoding, "ready", broken)
    else:
        monkeypatch.setattr(decoding, "ready", lambda z: False)
    return request.param


def test_one_warning_says_that_the_coprocessor_failed(beside, fault):
    """One that never answers may still do so."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        beside.generate(PROMPTS, 32, every=5, delay=None)
    message = "goes on without new latents: RuntimeError('the slice is gone')"
    assert sum(message in str(w.message) for w in said) == (fault != "never answers")


@pytest.mark.filterwarnings("ignore:the coprocessor failed")
def test_without_its_coprocessor_the_decoder_goes_on(lms, beside, monkeypatch, fault):
    """Bit for bit: the logits after the last token are the plain decoder's."""
    last, decode = [], compiled.decode_tokens

    def watched(*args, **options):
        state, cache = decode(*args, **options)
        last.append(np.asarray(state.logits))
        return state, cache

    monkeypatch.setattr(compiled, "decode_tokens", watched)
    found = beside.continuations(PROMPTS, 32, every=5, delay=None)
    without = last[-1]
    assert {c.joined for c in found} == {()}
    texts = [c.text for c in found]
    assert texts == beside.generate(PROMPTS, 32, augment=False)
    np.testing.assert_array_equal(without, last[-1])
    assert texts == lms["decoder"].generate(PROMPTS, 32)

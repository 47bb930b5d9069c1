"""A coprocessor of an assistant: what is refused, what must agree, the same on every mesh."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib import convert, train
from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.data.tokenizer import Tokenizer, difference
from latent_delib.delib import flops
from latent_delib.delib.cost import step_flops
from latent_delib.errors import UserError
from latent_delib.job import dry_run, experiment
from latent_delib.job import plan as planning
from latent_delib.weights import locate

SHARDED = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
# a text of two rows: eight devices split them
TWO_STEPS = {"train.steps": 2, "train.batch_size": 8, "method.placement": "overlay"}


@pytest.fixture
def config_of(make_config, assistant_folder):
    """config_of({"key": value, ...}) -> the tiny config, with the small assistant."""

    def make(changes=None):
        of_method = {"method.name": "assistant", "method.assistant": str(assistant_folder)}
        return make_config(of_method | (changes or {}))

    return make


@pytest.mark.parametrize(
    "path, said",
    [
        ("nowhere", "config.method.assistant: .*nowhere"),
        ("packaged", r"config.method.assistant=packaged: token \d+ .* is .*, not "),
    ],
)
def test_an_assistant_that_cannot_read_the_text_is_refused(config_of, path, said):
    with pytest.raises(UserError, match=said):
        experiment.read(config_of({"method.assistant": path}))


def test_another_tokenizer_may_know_more_tokens_and_no_token_by_another_number(tokenizer_path):
    own = Tokenizer(tokenizer_path)
    larger = Tokenizer(locate.PACKAGED / "tokenizer.model")
    assert difference(own, own) == ""
    assert "320 pieces, not 1024" in difference(larger, own)
    more = Tokenizer(tokenizer_path)
    more.vocab_size += 1
    assert difference(own, more) == ""


def test_what_must_agree_is_the_assistants_weights_not_its_path(
    config_of, assistant_folder, decoder_folder, tmp_path
):
    record = experiment.read(config_of()).record
    moved = shutil.copytree(assistant_folder, tmp_path / "moved")
    other = {"method.assistant": str(decoder_folder)}
    for purpose in ("resume", "evaluate", "start", "same_curve"):
        same = experiment.read(config_of({"method.assistant": str(moved)})).record
        assert not same.differences(record, purpose)
        different = experiment.read(config_of(other)).record
        assert [d.key for d in different.differences(record, purpose)] == ["method.assistant"]
    assert type(record).from_meta(record.meta(), "w") == record


def test_an_assistant_is_frozen_lies_as_a_decoder_does_and_is_counted(config_of, make_config):
    exp = experiment.read(config_of(SHARDED))
    plan = planning.make(exp)
    assert set(plan.frozen) == {"decoder", "assistant"} and set(plan.state.trainable) == {
        "coprocessor"
    }
    for leaf, decoder in zip(*(jax.tree.leaves(plan.frozen[r]) for r in plan.frozen)):
        assert leaf.sharding == decoder.sharding and leaf.dtype == decoder.dtype
    architecture = exp.aug.models.coprocessor.config
    assert architecture != exp.aug.decoder.config

    def useful(method):
        aug = dataclasses.replace(exp.aug, method=method)
        return step_flops(aug, 3, 64, 5, 6).useful

    reading = flops.text(architecture, 3 * 64, 64, outputs=False)
    np.testing.assert_allclose(useful("assistant") - useful("resized"), reading)
    without = experiment.read(make_config(SHARDED))
    held, held_without = (dry_run.held(e, planning.make(e)) for e in (exp, without))
    entries = 8 / 4 * 32 * 2 * architecture.num_layers * 2 * 8 * 4 / 2  # of keys and values
    assert held["cache of the text"] - held_without["cache of the text"] == entries


def trained_on(config, devices):
    """Metrics and state after two steps, and the frozen weights before and after."""
    exp = experiment.read(config, devices)
    plan = planning.make(exp)
    state, frozen = train.place_state(exp, plan, None)
    before = jax.tree.map(np.array, frozen)
    text = batches.Training(config.data, exp.tokenizer)
    rows = text.batches(batch_size=config.train.batch_size, seed=config.seed)
    step = planning.compile_step(exp, plan)
    metrics = []
    for _ in range(2):
        batch = mesh_lib.place_rows(exp.mesh, next(rows), config.train.batch_size)
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, jax.device_get(state.trainable), before, jax.device_get(frozen)


@pytest.mark.slow
def test_eight_devices_equal_one_and_the_frozen_stays(config_of):
    one, other = (
        trained_on(config_of(TWO_STEPS | mesh), devices)
        for mesh, devices in (({}, jax.devices()[:1]), (SHARDED, jax.devices()))
    )
    for found, expected in zip(one[0], other[0]):
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), one[1], other[1])
    for _, _, before, after in (one, other):
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_an_exported_coprocessor_finds_its_assistant(config_of, decoder_folder, tmp_path):
    """By the path in its record; where it has moved, by the one that is given."""
    moving = shutil.copytree(config_of().method.assistant, tmp_path / "assistant")
    train.train(config_of({"method.assistant": str(moving)}), str(tmp_path / "w"))
    convert.convert(str(tmp_path / "w"), str(tmp_path / "out"))
    decoder = ld.load_decoder(str(decoder_folder))
    at = ([[2, 5, 6, 7, 8, 9]], [[1, 4]])
    trained, exported = (ld.load_coprocessor(str(tmp_path / name)) for name in ("w", "out"))
    jax.tree.map(np.testing.assert_array_equal, trained.params, exported.params)
    assistant = trained.record["method.assistant"]
    small.named((tmp_path / "out" / "README.md").read_text(), assistant)
    expected = ld.AugmentedLM(decoder, trained).latents(*at)
    np.testing.assert_array_equal(ld.AugmentedLM(decoder, exported).latents(*at), expected)

    moved = str(shutil.move(moving, tmp_path / "moved"))
    with pytest.raises(UserError, match="assistant.*assistant=PATH") as error:
        ld.AugmentedLM(decoder, exported)
    small.named(str(error.value), moving)
    found = ld.load_coprocessor(str(tmp_path / "out"), assistant=moved)
    np.testing.assert_array_equal(ld.AugmentedLM(decoder, found).latents(*at), expected)
    other = ld.load_coprocessor(str(tmp_path / "out"), assistant=str(decoder_folder))
    with pytest.raises(UserError, match="assistant has fingerprint"):
        ld.AugmentedLM(decoder, other)


def test_an_assistant_for_a_coprocessor_that_has_none():
    with pytest.raises(
        UserError, match="assistant=packaged: method 'cache_augmentation' has no assistant"
    ):
        ld.load_coprocessor("packaged", assistant="packaged")

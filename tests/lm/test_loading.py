"""Loaded models: what they hold, and how they show themselves."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib import mesh
from latent_delib.job import build
from latent_delib.job.record import Record
from latent_delib.machine.checkpoint import Checkpoints


@pytest.mark.parametrize("step, wanted", [(None, 4), (2, 2), (np.int64(2), 2)])
def test_load_coprocessor_is_what_was_trained(trained, decoder, step, wanted):
    found = ld.load_coprocessor(trained, step)
    assert (found.method, found.num_latents) == ("cache_augmentation", 2)
    assert (found.placement, found.step) == ("after", wanted)
    assert found.fingerprint == decoder.fingerprint
    checkpoints = Checkpoints(str(trained), read_only=True)
    saved = checkpoints.restore_newest(step=wanted).trainable["coprocessor"]
    jax.tree.map(np.testing.assert_array_equal, found.params, saved)


def test_a_loaded_coprocessor_writes_latents(trained, decoder):
    lm = ld.AugmentedLM(decoder, ld.load_coprocessor(trained))
    assert lm.latents([[2, 5, 7]], [[1]]).shape == (1, 1, 2, decoder.config.embed_dim)


def test_a_folder_inside_the_workdir_is_refused(trained):
    with pytest.raises(ld.UserError, match="inside the workdir"):
        ld.load_coprocessor(trained / "checkpoints" / "4")


def test_a_trained_decoder_has_no_coprocessor(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    record = Record({"method": {"name": "decoder"}, "seed": 0}, "", step=1)
    tree = {"trainable": {"decoder": np.zeros(2)}, "optimizer": {"mu": np.zeros(2)}}
    checkpoints.save(1, tree, record.meta())
    checkpoints.close()
    with pytest.raises(ld.UserError, match="method 'decoder' has no coprocessor"):
        ld.load_coprocessor(str(tmp_path))


def test_loading_says_nothing(trained):
    """Orbax warns of a folder that is only read, and of options that follow from that."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("absl").addHandler(handler)
    try:
        ld.load_coprocessor(trained)
    finally:
        logging.getLogger("absl").removeHandler(handler)
    assert [record.getMessage() for record in said if record.levelno > logging.INFO] == []


def test_what_is_loaded_shows_itself_in_one_line(decoder, lms):
    of = decoder.fingerprint[:12]
    said = f"Decoder(4 layers of width 32, vocabulary of 320, float32, fingerprint {of})"
    assert repr(decoder) == said
    coprocessor = lms["after"].coprocessor
    said = "Coprocessor(cache_augmentation, 4 latents, placement after, untrained, float32, "
    said += f"of decoder {of})"
    assert repr(coprocessor) == said
    assert repr(lms["after"]) == f"AugmentedLM({decoder}, {coprocessor})"
    record = dataclasses.replace(coprocessor.record, step=7)
    assert "step 7" in repr(dataclasses.replace(coprocessor, record=record))


def test_the_package_shows_its_interface(monkeypatch):
    monkeypatch.delattr(ld, "mesh", raising=False)  # as before anybody has imported it
    assert ld.mesh is mesh and dir(ld) == sorted(ld.__all__)
    assert not hasattr(ld, "meshes")


def test_every_model_has_the_chosen_attention(decoder, lms):
    """The decoder, a coprocessor of its own size, and both where one is beside the other."""
    start = small.with_method(lms["overlay"].coprocessor, coprocessor={"num_layers": 2})
    lm = ld.AugmentedLM(decoder, start, None, build.one_device(), attention="reference")
    for aug in (lm.plain, lm.aug, lm.aug_beside):
        assert aug.decoder.form == "reference"
        assert aug.coprocessor in (None, lm.aug.coprocessor)
    assert lm.aug.coprocessor.form == "reference"
    assert lms["overlay"].aug.decoder.form == "xla"  # what "auto" is on a CPU


def test_the_chosen_attention_runs(decoder, lms, text):
    """Its logits are near those of another form; on 24 tokens they are not the same."""
    found = ld.AugmentedLM(decoder, attention="reference").logits(text)
    expected = lms["decoder"].logits(text)
    assert (found != expected).any()
    np.testing.assert_allclose(found, expected, atol=1e-4)

"""Decoders of other forms, loaded as they are: the same as if they had been converted first."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import mesh as mesh_lib
from latent_delib.convert import convert
from latent_delib.weights import locate


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2"])
def test_a_folder_of_hugging_face_s(hf, tmp_path, family):
    """Biases, a head of its own, layers of two kinds; on one device and split over eight."""
    theirs, ours = hf(family), tmp_path / "ours"
    about = {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(about))
    convert(str(theirs), str(ours))
    mesh = mesh_lib.make({"data": 4, "fsdp": 2})
    for dtype, where in ((jnp.float32, mesh), (jnp.bfloat16, None)):
        found = ld.load_decoder(theirs, dtype, where)
        expected = ld.load_decoder(ours, dtype, where)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
        for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params)):
            assert x.sharding == y.sharding
        assert (found.config, found.fingerprint) == (expected.config, expected.fingerprint)
    messages = [{"role": "user", "content": "a cat"}]
    assert found.tokenizer.chat(messages) == expected.tokenizer.chat(messages)


def test_decoders_that_cannot_be_loaded(hf):
    theirs = hf("llama")
    with pytest.raises(ld.UserError, match="is not converted yet; run latent_delib.convert"):
        locate.find_decoder(str(theirs))  # as training does
    with pytest.raises(ld.UserError, match="config.json': is a file; expected a decoder folder"):
        locate.find_decoder(str(theirs / "config.json"))
    (theirs / "tokenizer.model").unlink()
    with pytest.raises(ld.UserError, match="has no tokenizer"):
        ld.load_decoder(theirs)
    with pytest.raises(ld.UserError, match="not a GGUF file"):
        ld.load_decoder(theirs / "config.json")

"""What `transformers` makes of an exported folder; marked `reference`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FAMILIES

import latent_delib as ld
from latent_delib.convert import convert

pytestmark = pytest.mark.reference
TEXTS = (
    "the cat sat on  a mat\n\tand ran",
    " leading",
    "ünïcode 🎉",
    "x" * 40,
    "def f(x):\n    return x\n",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_decoder_computes_the_same(hf, tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    convert(str(hf(family)), str(tmp_path / "ours"))
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="huggingface")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    tokens = np.random.default_rng(0).integers(4, 320, (2, 24))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = ld.AugmentedLM(ld.load_decoder(str(tmp_path / "ours"))).logits(tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_text_ends_where_it_ends_there(hf, tmp_path):
    """At each EOS of generation_config.json, before and after both conversions."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    where = hf("gemma2")
    prompt = [2, 7, 30, 41]
    (plain,) = ld.AugmentedLM(ld.load_decoder(where)).continuations([prompt], 24)
    tokens = plain.tokens.tolist()
    last = max(set(tokens), key=tokens.index)  # the last token that is new
    assert tokens.index(last) > 1
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, last]}))
    convert(str(where), str(tmp_path / "ours"))
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="huggingface")
    for folder in (where, tmp_path / "back"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        text = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert text[0, len(prompt) :].tolist() == tokens[: tokens.index(last) + 1]
    for folder in (where, tmp_path / "ours", tmp_path / "back"):
        lm = ld.AugmentedLM(ld.load_decoder(folder))
        (found,) = lm.continuations([prompt], 24)
        rest = [lm.tokenizer.pad_id] * (23 - tokens.index(last))
        assert found.tokens.tolist() == [*tokens[: tokens.index(last) + 1], *rest]
        assert found.text == lm.tokenizer.decode_in_text(tokens[: tokens.index(last)])


@pytest.mark.parametrize("decoder", ["packaged", "runs/smollm2_135m/decoder"])
def test_an_exported_tokenizer_reads_the_same(tmp_path, decoder):
    transformers = pytest.importorskip("transformers")
    where = (
        Path(ld.__file__).parent / "weights" / "packaged"
        if decoder == "packaged"
        else Path(decoder)
    )
    if not where.is_dir():
        pytest.skip(f"{where} is not there: launch/smollm2.sh makes it")
    shutil.copytree(where, tmp_path / "ours")
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ours = ld.load_decoder(decoder).tokenizer
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)

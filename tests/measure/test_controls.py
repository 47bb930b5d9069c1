"""Latents of another text and of an earlier call: evaluated as by the naive reading."""

import shutil

import jax
import naive
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import evaluate
from latent_delib.data import token_files
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.measure import views
from latent_delib.measure.text import read_validation_text


@pytest.fixture
def hold_out(token_folder, tokenizer_path, tmp_path):
    """hold_out({source: documents}) -> the config's changes for this validation text."""
    tokenizer = Tokenizer(tokenizer_path)

    def write(documents):
        shutil.copytree(token_folder, where := tmp_path / "tokens")
        shutil.rmtree(where / "validation")
        meta = token_files.read_meta(str(where)) | {"validation": []}
        for number, (source, texts) in enumerate(documents.items()):
            named = [("", np.array(tokenizer.encode(text), np.int32)) for text in texts]
            written = token_files.write_validation(str(where), number, named, meta)
            meta["validation"].append({"source": source, **written})
        token_files.write_meta(str(where), meta)
        return {"data.token_files": str(where), "data.validation": tuple(documents)}

    return write


@pytest.fixture
def rows_of(make_config, trained, tmp_path):
    """rows_of(changes) -> the table of the trained run, evaluated with these changes."""

    def rows(changes):
        return evaluate.evaluate(make_config(changes), str(trained), str(tmp_path / "out"))["rows"]

    return rows


def test_latents_of_another_text_and_of_an_earlier_call(
    make_config, rows_of, hold_out, trained, decoder_folder, capsys
):
    """Each against the same thing done by hand; the longest piece's donor ends before it."""
    documents = [
        "the cat sat",
        "a dog ran to the door and",
        "when rain fell over green hills",
        "a mat on the door",
    ]
    changes = hold_out({"lines:some": documents})
    own = rows_of(changes)
    swapped = rows_of(changes | {"evaluate.swap": True})
    late = rows_of(changes | {"evaluate.delay": 2})
    said = capsys.readouterr().out
    assert "latents of another text" in said and "delay 2" in said

    config = make_config(changes)
    text = read_validation_text(experiment.read(config))
    length = text.lengths()
    donors = views.donors(config.evaluate.seed, text, length)
    assert (length[donors] < length - 1).any()

    def of_the_donor(number, p):
        donor = text.pieces[donors[number]]
        return donor, min(p, len(donor) - 1)

    def of_two_tokens_ago(number, p):
        return text.pieces[number], max(p - 2, 0)

    decoder, coprocessor = ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained))
    for rows, written_at in ((swapped, of_the_donor), (late, of_two_tokens_ago)):
        assert [r["tokens"] for r in rows] == [r["tokens"] for r in own]
        assert [r["decoder_ppl"] for r in rows] == [r["decoder_ppl"] for r in own]
        assert abs(rows[0]["augmented_ppl"] - own[0]["augmented_ppl"]) > 1e-4
        expected = by_hand(decoder, coprocessor, text.pieces, written_at)
        np.testing.assert_allclose([row["augmented_ppl"] for row in rows[:3]], expected, rtol=1e-5)


def by_hand(decoder, coprocessor, pieces, written_at):
    """Returns the perplexity of the n-th token, n = 1, 2, 3, over all positions.

    written_at(number, p) -> the text that the latents after a piece's token p read, and the token
    of that text after which they are written.
    """
    params, found = jax.device_get((decoder.params, coprocessor.params)), [[], [], []]
    placement = coprocessor.placement
    for number, piece in enumerate(pieces):
        for p in range(len(piece) - 1):
            source, q = written_at(number, p)
            read = naive.embed(decoder.config, params[0], source[: q + 1])
            z = naive.written(decoder.config, *params, read, q, placement)
            ahead = naive.trace_nll(decoder.config, *params, piece, p, 3, placement, z=z)
            for n, nll in enumerate(ahead):
                found[n].append(nll)
    return [np.exp(np.mean(nll)) for nll in found]


def test_the_other_text_is_of_another_document(rows_of, hold_out):
    """Latents of a document's copy are its own, so the donor's row and position are right."""
    copies = ["the cat sat on the mat and looked at the other cat"] * 10
    changes = hold_out({"lines:copies": copies})
    own = [row["augmented_ppl"] for row in rows_of(changes)]
    swapped = [row["augmented_ppl"] for row in rows_of(changes | {"evaluate.swap": True})]
    assert len(own) > 2
    np.testing.assert_allclose(swapped, own, rtol=1e-6)


def test_a_document_alone_is_refused(rows_of, hold_out):
    """Its source has no other document whose latents it could be given."""
    documents = {"lines:two": ["the cat sat", "a dog ran"], "lines:alone": ["the dog sat"]}
    changes = hold_out(documents)
    with pytest.raises(UserError, match="config.evaluate.swap: 'lines:alone'.* one document"):
        rows_of(changes | {"evaluate.swap": True})

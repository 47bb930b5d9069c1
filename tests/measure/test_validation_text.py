"""Validation text: cut into pieces without loss; documents, works and sources told apart."""

import json

import numpy as np
import pytest
from naive_perplexity import cut

from latent_delib import evaluate
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.measure.text import read_validation_text
from latent_delib.results.evaluation import as_text
from tests.texts import write_token_files


@pytest.fixture
def read(make_config):
    return lambda changes: read_validation_text(experiment.read(make_config(changes)))


@pytest.mark.parametrize("length", [2, 7, 16, 500])
def test_long_documents_are_cut_and_nothing_is_lost(read, documents, length):
    text = read({"evaluate.max_length": length})
    assert [piece.tolist() for piece in text.pieces] == cut(documents, length)
    assert text.lengths().max() <= length and (text.lengths() - 1).sum() == sum(map(len, documents))
    owned = np.bincount(text.document, weights=text.lengths() - 1)
    assert owned.tolist() == [len(document) for document in documents]


def test_a_quick_look_is_spread_over_the_source(read, documents):
    text = read({"evaluate.max_pieces": 5})
    owners = [i for i, document in enumerate(documents) for _ in cut([document], 32)]
    wanted = [i * len(owners) // 5 for i in range(5)]
    assert [piece.tolist() for piece in text.pieces] == [cut(documents, 32)[i] for i in wanted]
    kept = sorted({owners[i] for i in wanted})
    assert [kept[d] for d in text.document] == [owners[i] for i in wanted]
    assert len(text.source) == len(kept) < len(documents)
    assert [text.works[work] for work in text.work] == [f"{document % 2}.txt" for document in kept]


def test_sources_apart_and_together(make_config, trained, documents, token_folder, tmp_path):
    """The same documents as two sources: the first has five of them."""
    whole = [("", np.array(document, np.int32)) for document in documents]
    parts = {"lines:first": whole[:5], "lines:second": whole[5:]}
    folder, about = str(tmp_path / "tokens"), json.loads((token_folder / "meta.json").read_text())
    write_token_files(folder, about, {}, parts)
    both = {"data.token_files": folder, "data.validation": tuple(parts)}
    result = evaluate.evaluate(make_config(both), str(trained), str(tmp_path / "both"))
    pooled = evaluate.evaluate(make_config(), str(trained), str(tmp_path / "pooled"))
    assert {name: found["documents"] for name, found in result["sets"].items()} == {
        "lines:first": 5,
        "lines:second": 7,
    }
    for key in ("documents", "pieces"):
        assert result[key] == pooled[key]
    for row, known, *apart in zip(
        result["rows"], pooled["rows"], *(x["rows"] for x in result["sets"].values())
    ):
        assert list(row.values())[:5] == pytest.approx(list(known.values())[:5], rel=1e-6)
        assert row["tokens"] == sum(x["tokens"] for x in apart)
        for key in ("decoder_ppl", "augmented_ppl"):
            nats = sum(x["tokens"] * np.log(x[key]) for x in apart)
            assert row[key] == pytest.approx(np.exp(nats / row["tokens"]))
    heads = [line for line in as_text(result).splitlines() if line[0] not in " m0123456789"]
    assert heads[1:] == ["lines:first, 5 documents", "lines:second, 7 documents", "all"]

    with pytest.raises(UserError, match="'lines:first'"):
        experiment.read(make_config(both | {"data.validation": ("lines:first",) * 2}))

"""Perplexity n tokens ahead: equal to a naive sum over the Python interface, however it is batched and sharded."""

import json

import jax
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import evaluate, experiment
from latent_delib import mesh as mesh_lib
from latent_delib.tokenizer import Tokenizer

A, MAX = 4, 32  # evaluate.num_ahead and evaluate.max_length of the tiny config


@pytest.fixture(scope="module")
def documents(texts, tokenizer_path):
    return [Tokenizer(tokenizer_path).encode(text) for text in texts["validation"]]


def cut(documents, length, bos=2):
    return [[bos, *d[i : i + length - 1]] for d in documents for i in range(0, len(d), length - 1)]


def naive_rows(lm, pieces):
    """The table, from log-probabilities after every token of every piece."""
    rows = []
    text = np.zeros((len(pieces), MAX + A), np.int32)
    for row, piece in zip(text, pieces):
        row[: len(piece)] = piece
    logprobs = lm.ahead_logprobs(text, np.tile(np.arange(MAX), (len(pieces), 1)), A)
    for n in range(1, A + 1):
        counted = [(b, t) for b, piece in enumerate(pieces) for t in range(len(piece) - n)]
        plain, ours = (np.exp(-np.mean([x[b, t, n - 1] for b, t in counted], dtype=np.float64)) for x in logprobs)
        rows.append([n, len(counted), plain, ours, 100 * (ours / plain - 1)])
    return rows


def assert_same(rows, expected):
    """Perplexities to 1e-6 relative, so changes to a few 1e-4 of a percent; counts exactly."""
    assert [list(row) for row in rows] == [["n", "tokens", "decoder_ppl", "augmented_ppl", "change_percent"]] * A
    rows, expected = (np.array([list(r.values()) if isinstance(r, dict) else r for r in x]) for x in (rows, expected))
    np.testing.assert_array_equal(rows[:, :2], expected[:, :2])
    np.testing.assert_allclose(rows[:, 2:4], expected[:, 2:4], rtol=1e-6)
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], atol=3e-4)


def test_a_checkpoint(make_config, trained, decoder_folder, documents, tmp_path, capsys):
    config = make_config()
    result = evaluate.evaluate(config, str(trained), str(tmp_path / "out"))
    lm = ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained)))
    pieces = cut(documents, MAX)
    assert_same(result["rows"], naive_rows(lm, pieces))
    assert result["rows"][0]["tokens"] == sum(map(len, documents)) and len(pieces) > len(documents)
    assert abs(result["rows"][0]["change_percent"]) > 0.1  # latents do something

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["perplexity.json", "perplexity.png"]
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == result
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert set(result) == {"rows", "pieces", "config", "checkpoint", "fingerprint"}
    assert result["pieces"] == len(pieces) and result["config"]["method"]["num_ahead"] == config.method.num_ahead
    assert result["checkpoint"] == str(trained / "checkpoints" / "4")
    assert result["fingerprint"] == lm.decoder.fingerprint
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["n", "1", "2", "4"]
    assert table[1].split()[3] == f"{result['rows'][0]['augmented_ppl']:.4f}"


# batch_size, positions, devices along data, fsdp, traces and tensor.
SPLITS = {
    "by rows": (8, MAX, (8, 1, 1, 1)),
    "widths and heads": (16, 5, (2, 2, 1, 2)),
    "traces": (4, 6, (2, 1, 2, 2)),
    "one device": (5, 7, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_independent_of_batches_and_devices(make_config, decoder_folder, documents, name):
    """An untrained overlay coprocessor of three latents, over every token."""
    batch_size, positions, shape = SPLITS[name]
    changes = {"method.placement": "overlay", "method.num_latents": 3}
    changes |= {"evaluate.batch_size": batch_size, "evaluate.positions": positions}
    changes |= {f"mesh.{axis}": n for axis, n in zip(mesh_lib.AXES, shape)}
    exp = experiment.read(make_config(changes), jax.devices()[: np.prod(shape)])
    mesh = exp.mesh
    lm = ld.AugmentedLM(
        decoder := ld.load_decoder(str(decoder_folder)), ld.init_coprocessor(decoder, 3, "overlay", seed=5)
    )
    shardings = mesh_lib.parameters(mesh, lm.params, evaluate.PARAM_AXES, mesh_lib.TRAINABLE)
    pieces = evaluate.read_pieces(exp)
    assert len(pieces) > batch_size
    sums = evaluate.perplexity(exp, jax.device_put(lm.params, shardings), pieces)
    assert_same(evaluate.table(sums), naive_rows(lm, cut(documents, MAX)))


def test_the_decoder_needs_no_checkpoint(make_config, decoder_folder, documents, tmp_path):
    result = evaluate.evaluate(make_config({"method.name": "decoder"}), str(tmp_path / "no job"), str(tmp_path / "out"))
    assert_same(result["rows"], naive_rows(ld.AugmentedLM(ld.load_decoder(str(decoder_folder))), cut(documents, MAX)))
    assert result["checkpoint"] is None and not (tmp_path / "no job").exists()
    assert all(row["change_percent"] == 0 and row["augmented_ppl"] == row["decoder_ppl"] for row in result["rows"])


@pytest.mark.parametrize("length", [2, 7, 16, 500])
def test_long_documents_are_cut_and_nothing_is_lost(make_config, documents, length):
    pieces = evaluate.read_pieces(experiment.read(make_config({"evaluate.max_length": length})))
    assert [piece.tolist() for piece in pieces] == cut(documents, length)
    assert max(map(len, pieces)) <= length and sum(len(piece) - 1 for piece in pieces) == sum(map(len, documents))


def test_a_quick_look_is_spread_over_the_source(make_config, documents):
    exp = experiment.read(make_config({"evaluate.max_pieces": 5}))
    pieces, wanted = [piece.tolist() for piece in evaluate.read_pieces(exp)], cut(documents, MAX)
    assert len(pieces) == 5 and pieces == [wanted[i * len(wanted) // 5] for i in range(5)]


def test_no_row_where_no_document_reaches():
    tokens = np.array([4.0, 2.0, 0.0])
    rows = evaluate.table(evaluate.Sums(np.log([2.0, 8.0, 1.0]) * tokens, np.log([2.0, 4.0, 1.0]) * tokens, tokens))
    assert [list(row.values()) for row in rows] == [
        [1, 4, pytest.approx(2), pytest.approx(2), pytest.approx(0)],
        [2, 2, pytest.approx(8), pytest.approx(4), pytest.approx(-50)],
    ]


def test_mistakes(make_config, trained, make_decoder, tmp_path):
    def refused(message, changes, workdir=trained, step=None):
        with pytest.raises(ld.UserError, match=message) as caught:
            evaluate.evaluate(make_config(changes), str(workdir), str(tmp_path / "out"), step)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("holds no checkpoints", {}, tmp_path)
    refused(r"no checkpoint of step 3; there are \[2, 4\]", {}, step=3)
    refused("checkpoint has method.num_latents=2, this config has 3", {"method.num_latents": 3})
    refused("checkpoint has method.placement=after, this config has overlay", {"method.placement": "overlay"})
    refused("checkpoint has method.name=cache_aug", {"method.name": "pause_tokens"})
    refused("checkpoint has fingerprint=", {"decoder.path": str(make_decoder(8))})
    refused("config.evaluate.batch_size=3 does not split over 8 devices", {"evaluate.batch_size": 3})

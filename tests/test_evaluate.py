"""Perplexity n tokens ahead: equal to a naive sum over the Python interface, however it is batched and sharded."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import latent_delib as ld
from latent_delib import evaluate
from latent_delib import mesh as mesh_lib
from latent_delib.data import token_files
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.job import experiment
from latent_delib.lm import load
from latent_delib.machine import checkpoint
from latent_delib.measure import perplexity
from latent_delib.nn.layers import PARAM_AXES

A, MAX = 4, 32  # evaluate.num_ahead and evaluate.max_length of the tiny config
KEYS = ["n", "tokens", "decoder_ppl", "augmented_ppl", "change_percent", "change_low", "change_high"]


@pytest.fixture(scope="module")
def documents(texts, tokenizer_path):
    return [Tokenizer(tokenizer_path).encode(text) for text in texts["validation"]]


def cut(documents, length, bos=2):
    return [[bos, *d[i : i + length - 1]] for d in documents for i in range(0, len(d), length - 1)]


def naive_rows(lm, pieces, chosen=None):
    """The table, from log-probabilities after every token of every piece, or after the chosen ones of each."""
    chosen = chosen or [range(len(piece)) for piece in pieces]
    rows = []
    text = np.zeros((len(pieces), MAX + A), np.int32)
    for row, piece in zip(text, pieces):
        row[: len(piece)] = piece
    logprobs = lm.ahead_logprobs(text, np.tile(np.arange(MAX), (len(pieces), 1)), A)
    for n in range(1, A + 1):
        counted = [(b, t) for b, piece in enumerate(pieces) for t in chosen[b] if t < len(piece) - n]
        plain, ours = (np.exp(-np.mean([x[b, t, n - 1] for b, t in counted], dtype=np.float64)) for x in logprobs)
        rows.append([n, len(counted), plain, ours, 100 * (ours / plain - 1)])
    return rows


def assert_same(rows, expected):
    """Perplexities to 1e-6 relative, so changes to a few 1e-4 of a percent; counts exactly."""
    assert [list(row) for row in rows] == [KEYS] * A
    assert all(row["change_low"] <= row["change_percent"] <= row["change_high"] for row in rows)
    rows, expected = np.array([list(row.values())[:5] for row in rows]), np.array(expected)
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

    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["documents.npz", "perplexity.json", "perplexity.png"]
    assert json.loads((out / "perplexity.json").read_text()) == result
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n")
    keys = {"rows", "sets", "documents", "pieces", "config", "checkpoint", "step", "fingerprint", "text", "provenance"}
    keys |= {"num_works", "interval_over", "past_donors", "draws"}
    assert set(result) == keys and set(result["provenance"]) == {"command", "date", "hardware", "versions"}
    assert result["pieces"] == len(pieces) and result["config"]["method"]["num_ahead"] == config.method.num_ahead
    assert (result["checkpoint"], result["step"]) == (str(trained / "checkpoints" / "4"), 4)
    assert result["fingerprint"] == lm.decoder.fingerprint
    heading, *table, head, first, second = capsys.readouterr().out.splitlines()[-8:]
    assert heading.endswith(f"{len(pieces)} pieces of 12 documents of 2 works")
    assert [line.split()[0] for line in table] == ["n", "1", "2", "4"] and table[0].endswith("interval over works")
    row = result["rows"][0]
    assert head.split() == "by work, intervals over its documents n = 1 n = 4".split()
    works = result["sets"][config.data.validation[0]]["works"]
    for line, (name, work) in zip((first, second), works.items(), strict=True):
        assert work["documents"] == 6 and work["interval_over"] == "documents of one work"
        label, change = line.split("documents")
        assert label == f"  {name}, 6 " and change.split()[0] == f"{work['rows'][0]['change_percent']:+.2f}%"
    assert sum(work["rows"][0]["tokens"] for work in works.values()) == row["tokens"]
    assert table[1].split()[3] == f"{row['augmented_ppl']:.4f}"
    assert table[1].endswith(f"[{row['change_low']:+.2f}, {row['change_high']:+.2f}]")

    with np.load(out / "documents.npz") as saved:
        source, sources, tokens, decoder, augmented = (
            saved[k] for k in ("source", "sources", *perplexity.Sums._fields)
        )
        assert saved["work"].tolist() == [0, 1] * 6 and saved["works"].tolist() == ["0.txt", "1.txt"]
    assert source.tolist() == [0] * len(documents) and sources.tolist() == list(config.data.validation)
    assert (tokens.dtype, decoder.dtype, augmented.dtype) == (np.int64, np.float64, np.float64)
    assert decoder.shape == augmented.shape == tokens.shape == (len(documents), A)
    assert tokens[:, 0].tolist() == [len(document) for document in documents]
    longest = int(np.argmax(tokens[:, 0]))
    alone = naive_rows(lm, cut([documents[longest]], MAX))
    for n, count, plain, ours, _ in alone:
        assert tokens[longest, n - 1] == count
        assert np.exp(decoder[longest, n - 1] / count) == pytest.approx(plain, rel=1e-6)
        assert np.exp(augmented[longest, n - 1] / count) == pytest.approx(ours, rel=1e-6)


def test_sets_apart_and_together(make_config, trained, texts, token_folder, tokenizer_path, tmp_path, capsys):
    """The same documents as two sources: the first has five of them."""
    encode, parts = Tokenizer(tokenizer_path).encode, {"lines:first": slice(0, 5), "lines:second": slice(5, None)}
    folder, meta = str(tmp_path / "tokens"), json.loads((token_folder / "meta.json").read_text())
    meta["validation"] = []
    for number, (name, part) in enumerate(parts.items()):
        found = (("", np.array(encode(text), np.int32)) for text in texts["validation"][part])
        meta["validation"].append({"source": name, **token_files.write_validation(folder, number, found, meta)})
    token_files.write_meta(folder, meta)
    both = {"data.token_files": folder, "data.validation": tuple(parts)}
    result = evaluate.evaluate(make_config(both), str(trained), str(tmp_path / "both"))
    said = capsys.readouterr().out
    pooled = evaluate.evaluate(make_config(), str(trained), str(tmp_path / "pooled"))
    assert {name: found["documents"] for name, found in result["sets"].items()} == {"lines:first": 5, "lines:second": 7}
    for key in ("documents", "pieces"):
        assert result[key] == pooled[key]
    for row, known, *apart in zip(result["rows"], pooled["rows"], *(x["rows"] for x in result["sets"].values())):
        assert list(row.values())[:5] == pytest.approx(list(known.values())[:5], rel=1e-6)
        assert row["tokens"] == sum(x["tokens"] for x in apart)
        for key in ("decoder_ppl", "augmented_ppl"):
            nats = sum(x["tokens"] * np.log(x[key]) for x in apart)
            assert row[key] == pytest.approx(np.exp(nats / row["tokens"]))
    heads = [line for line in said.splitlines() if line[0] not in " 0123456789"]
    assert heads[1:] == ["lines:first, 5 documents", "lines:second, 7 documents", "all"]

    with pytest.raises(ld.UserError, match="config.data.validation: 'lines:first' is listed twice"):
        perplexity.read_text(experiment.read(make_config(both | {"data.validation": ("lines:first",) * 2})))


def test_positions_are_a_function_of_seed_and_piece():
    drawn = [perplexity.positions(0, number, 500, 20, 500) for number in range(3)]
    for at in drawn:
        assert len(set(at)) == 20 and (np.diff(at) > 0).all() and 0 <= at.min() and at.max() < 499
    assert len({tuple(at) for at in [*drawn, perplexity.positions(1, 0, 500, 20, 500)]}) == 4
    np.testing.assert_array_equal(drawn[1], perplexity.positions(0, 1, 500, 20, 500))
    for most in (0, 9, 10, 11):
        assert len(perplexity.positions(0, 0, 11, most, 11)) == min(most or 10, 10)


@pytest.mark.parametrize("length, first", [(11, 0), (8, 0), (2, 0), (8, 3), (3, 3)])
def test_every_token_is_as_likely_to_be_drawn(length, first):
    """Whatever the length of its piece; of none more than `most`."""
    most, seeds, usable = 3, 3000, max(0, length - 1 - first)
    drawn = [perplexity.positions(seed, 5, length, most, 11, first) for seed in range(seeds)]
    assert max(map(len, drawn)) <= most
    times = np.bincount(np.concatenate(drawn).astype(int), minlength=length)
    assert not times[:first].any() and not times[first + usable :].any()
    expected = seeds * most / (10 - first)
    assert (abs(times[first : first + usable] - expected) < 5 * expected**0.5).all()


def test_some_positions(make_config, trained, decoder_folder, documents, tmp_path, monkeypatch):
    """Their values are those of a naive sum, for both sides, however they are batched; no others are computed."""
    lm = ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained)))
    pieces, computed = cut(documents, MAX), []
    jit_steps = perplexity.jit_steps

    def counting(exp):
        steps = jit_steps(exp)
        return steps._replace(ahead=lambda *x: computed.append(np.asarray(x[-1])) or steps.ahead(*x))

    monkeypatch.setattr(perplexity, "jit_steps", counting)
    chosen = [perplexity.positions(7, i, len(piece), 3, MAX) for i, piece in enumerate(pieces)]
    expected = naive_rows(lm, pieces, chosen)
    for batch_size, positions in ((8, 8), (16, 2)):
        changes = {"evaluate.max_positions": 3, "evaluate.seed": 7, "evaluate.batch_size": batch_size}
        config = make_config(changes | {"evaluate.positions": positions})
        assert_same(evaluate.evaluate(config, str(trained), str(tmp_path / "out"))["rows"], expected)
        assert max(at.shape[1] for at in computed) == min(positions, 3)
        at = np.concatenate([at.ravel() for at in computed])
        assert np.count_nonzero(at < MAX - 1) == sum(map(len, chosen))
        computed.clear()


@pytest.mark.parametrize("method", ["cache_augmentation", "decoder"])
def test_a_longer_prompt_for_the_decoder_alone(make_config, trained, decoder_folder, documents, tmp_path, method):
    """The first tokens of each piece are lost to the evaluated model; both are asked for the same tokens."""
    lost, pieces = 5, cut(documents, MAX)
    lm = ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained)))
    texts = np.zeros((2, len(pieces), MAX + A), np.int32)
    for row, piece in enumerate(pieces):
        texts[0, row, : len(piece)] = piece
        texts[1, row, : max(1, len(piece) - lost)] = piece[:1] + piece[1 + lost :]
    at = np.tile(np.arange(MAX), (len(pieces), 1))
    plain, ours = lm.ahead_logprobs(texts[0], at, A)[0], lm.ahead_logprobs(texts[1], at, A)[method != "decoder"]
    changes = {"method.name": method, "evaluate.longer_prompt": lost}
    workdir = trained if method != "decoder" else tmp_path / "none"
    rows = evaluate.evaluate(make_config(changes), str(workdir), str(tmp_path / "out"))["rows"]
    for n, row in enumerate(rows, start=1):
        counted = [(b, t) for b, piece in enumerate(pieces) for t in range(lost, len(piece) - n)]
        nll = [np.mean([-x[b, t - shift, n - 1] for b, t in counted]) for x, shift in ((plain, 0), (ours, lost))]
        assert row["tokens"] == len(counted)
        np.testing.assert_allclose([row["decoder_ppl"], row["augmented_ppl"]], np.exp(nll), rtol=1e-6)


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
    shardings = mesh_lib.parameters(mesh, lm.params, PARAM_AXES)
    text = perplexity.read_text(exp)
    assert len(text.pieces) > batch_size
    params, sums = jax.device_put(lm.params, shardings), perplexity.zeros(exp, text)
    rooms = ({"decoder": params["decoder"]}, {"coprocessor": params["coprocessor"]})
    done = list(perplexity.add_up(exp, perplexity.jit_steps(exp), *rooms, text, sums))
    assert done[-1] == len(text.pieces) and np.diff([0, *done]).max() <= batch_size
    assert_same(perplexity.table(sums, text.work, 0), naive_rows(lm, cut(documents, MAX)))


def test_the_decoder_needs_no_checkpoint(make_config, decoder_folder, documents, tmp_path):
    config, nothing = make_config({"method.name": "decoder"}), str(tmp_path / "no job")
    with pytest.raises(ld.UserError, match="no job: holds no checkpoints"):
        evaluate.evaluate(config, nothing, str(tmp_path / "out"), step=3)
    result = evaluate.evaluate(config, nothing, str(tmp_path / "out"))
    assert_same(result["rows"], naive_rows(ld.AugmentedLM(ld.load_decoder(str(decoder_folder))), cut(documents, MAX)))
    assert result["checkpoint"] is None and not (tmp_path / "no job").exists()
    assert all(row["change_percent"] == 0 and row["augmented_ppl"] == row["decoder_ppl"] for row in result["rows"])


@pytest.mark.parametrize("length", [2, 7, 16, 500])
def test_long_documents_are_cut_and_nothing_is_lost(make_config, documents, length):
    text = perplexity.read_text(experiment.read(make_config({"evaluate.max_length": length})))
    pieces = text.pieces
    assert [piece.tolist() for piece in pieces] == cut(documents, length)
    assert max(map(len, pieces)) <= length and sum(len(piece) - 1 for piece in pieces) == sum(map(len, documents))
    owned = np.bincount(text.document, weights=[len(piece) - 1 for piece in pieces])
    assert owned.tolist() == [len(document) for document in documents]


def test_a_quick_look_is_spread_over_the_source(make_config, documents):
    text = perplexity.read_text(experiment.read(make_config({"evaluate.max_pieces": 5})))
    owners = [i for i, document in enumerate(documents) for _ in cut([document], MAX)]
    wanted = [i * len(owners) // 5 for i in range(5)]
    assert [piece.tolist() for piece in text.pieces] == [cut(documents, MAX)[i] for i in wanted]
    kept = sorted({owners[i] for i in wanted})
    assert [kept[d] for d in text.document] == [owners[i] for i in wanted]
    assert len(text.source) == len(kept) < len(documents)
    assert [text.works[work] for work in text.work] == [f"{document % 2}.txt" for document in kept]


def test_token_files_that_do_not_say_which_work_a_document_is_of(make_config, token_folder, tmp_path, capsys):
    """Those of an older version: each document counts as a work, and a line says so; the text is the same."""
    folder = shutil.copytree(token_folder, tmp_path / "old")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["validation"][0]["works"]
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 2}))
    known = perplexity.read_text(experiment.read(make_config()))
    assert known.works == ("0.txt", "1.txt") and known.work.tolist() == [0, 1] * 6
    assert capsys.readouterr().err == ""
    text = perplexity.read_text(experiment.read(make_config({"data.token_files": str(folder)})))
    assert text.works == ("",) * 12 and text.work.tolist() == list(range(12)) and text.digest() == known.digest()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: config.data.token_files: {folder} does not say which work a document is of")
    assert known.works_known and not text.works_known

    sums = perplexity.Sums(np.ones((12, 1), int), np.ones((12, 1)), np.ones((12, 1)))
    summary = perplexity.summary(sums, text.work, 0, text.works_known)
    assert summary["interval_over"] is None
    assert "interval over documents of unknown works" in perplexity.show(summary["rows"], None)
    result = {"rows": summary["rows"], "sets": {}}
    evaluate.write(result, text, sums, epath.Path(tmp_path))
    with np.load(tmp_path / "documents.npz") as found:
        assert "source" in found and "work" not in found and "works" not in found


def test_no_interval_where_one_of_several_works_reaches():
    """The two long documents are of one work: what they say at n = 2 holds for no other."""
    tokens = np.array([[5, 5], [5, 5], [5, 0], [5, 0]])
    sums = perplexity.Sums(tokens, np.ones((4, 2)), np.array([[0.5, 0.5], [0.7, 0.7], [0.9, 0], [0.8, 0]]))
    low, high = perplexity.interval(sums, np.array([0, 0, 1, 2]), 0)
    assert low[0] < high[0] < 0 and np.isnan([low[1], high[1]]).all()
    assert not np.isnan(perplexity.interval(sums.of(np.array([0, 1])), np.array([0, 0]), 0)).any()


def test_no_row_where_no_document_reaches():
    tokens = np.array([[3, 2, 0], [1, 0, 0]])
    decoder, augmented = np.log([2.0, 8.0, 1.0]) * tokens, np.log([2.0, 4.0, 1.0]) * tokens
    rows = perplexity.table(perplexity.Sums(tokens, decoder, augmented), np.arange(2), 0)
    close = pytest.approx
    assert [list(row.values()) for row in rows] == [
        [1, 4, close(2), close(2), close(0), close(0), close(0)],
        [2, 2, close(8), close(4), close(-50), None, None],  # one document says nothing of others
    ]
    assert perplexity.show(rows, "documents").splitlines()[-1].endswith("one alone")


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_intervals_are_a_bootstrap_over_documents(monkeypatch, at_once):
    """Resample by resample, whatever the number of them in memory; and the right width for means of a normal."""
    monkeypatch.setattr(perplexity, "DRAWN_AT_ONCE", at_once)
    draw = np.random.default_rng(3)
    tokens = draw.integers(0, 9, (400, 2))
    tokens[0] = 9
    decoder = draw.normal(3, 1, tokens.shape) * tokens
    augmented = decoder + draw.normal(-0.01, 0.05, tokens.shape) * tokens
    found = perplexity.interval(perplexity.Sums(tokens, decoder, augmented), np.arange(400), 11)
    resample, changes = np.random.default_rng(11), []
    for _ in range(2000):
        drawn = resample.integers(400, size=400)
        changes.append((augmented - decoder)[drawn].sum(0) / tokens[drawn].sum(0))
    np.testing.assert_allclose(found, 100 * np.expm1(np.percentile(changes, [2.5, 97.5], axis=0)), rtol=1e-9)
    each, mean = (augmented - decoder)[:, 0], tokens[:, 0].mean()
    spread = np.std(each - tokens[:, 0] * each.sum() / tokens[:, 0].sum()) / mean / 400**0.5  # of a ratio of sums
    assert (found[1] - found[0])[0] == pytest.approx(100 * 2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_intervals_draw_works_and_then_their_documents(monkeypatch, at_once):
    """The same draws one by one; of documents that do not lie work by work."""
    monkeypatch.setattr(perplexity, "DRAWN_AT_ONCE", at_once)
    draw = np.random.default_rng(4)
    work = draw.permutation(np.repeat([7, 2, 9, 4], [1, 5, 2, 12]))
    tokens = draw.integers(1, 9, (20, 1))
    decoder = draw.normal(3, 1, tokens.shape) * tokens
    augmented = decoder + draw.normal(0, 0.5, tokens.shape) * tokens
    found = perplexity.interval(perplexity.Sums(tokens, decoder, augmented), work, 11)
    resample, changes = np.random.default_rng(11), []
    documents = [np.flatnonzero(work == name) for name in (2, 4, 7, 9)]
    for _ in range(2000):
        of_works = [documents[w] for w in resample.integers(4, size=4)]
        within = iter(resample.integers(np.concatenate([np.full(len(d), len(d)) for d in of_works])))
        drawn = [d[next(within)] for d in of_works for _ in d]
        changes.append((augmented - decoder)[drawn].sum(0) / tokens[drawn].sum(0))
    np.testing.assert_allclose(found, 100 * np.expm1(np.percentile(changes, [2.5, 97.5], axis=0)), rtol=1e-9)


def test_works_with_opposite_effects_tell_nothing_of_a_third(capsys):
    """One gains, one loses, each surely: over works the change may be either, over documents alone it is about zero."""
    tokens = np.full((80, 1), 100)
    decoder = 4.0 * tokens
    effect = np.repeat([-0.02, 0.03], [60, 20]) + np.random.default_rng(0).normal(0, 0.005, 80)
    sums = perplexity.Sums(tokens, decoder, decoder + effect[:, None] * tokens)
    work = np.repeat([0, 1], [60, 20])
    whole = perplexity.summary(sums, work, 0)
    (row,) = whole["rows"]
    assert (whole["interval_over"], whole["num_works"]) == ("works", 2)
    assert row["change_low"] < -1.8 and row["change_high"] > 2.8
    (documents,) = perplexity.summary(sums, np.arange(80), 0)["rows"]
    assert documents["change_high"] < 0, "a bootstrap over documents is sure of a gain"
    novel = perplexity.summary(sums.of(work == 0), work[work == 0], 0)
    assert novel["interval_over"] == "documents of one work" and novel["rows"][0]["change_high"] < -1.7
    assert "over documents of one work" in perplexity.show(novel["rows"], novel["interval_over"])


def test_mistakes(make_config, trained, make_decoder, tmp_path):
    def refused(message, changes, workdir=trained, step=None):
        with pytest.raises(ld.UserError, match=message) as caught:
            evaluate.evaluate(make_config(changes), str(workdir), str(tmp_path / "out"), step)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("holds no checkpoints", {}, tmp_path)
    refused(r"no checkpoint of step 3; there are \[2, 4\]", {}, step=3)
    refused("trained with method.num_latents=2, this config has method.num_latents=3", {"method.num_latents": 3})
    refused("trained with method.placement=after, this", {"method.placement": "overlay"})
    refused("trained with method.name=cache_aug", {"method.name": "pause_tokens"})
    refused("trained with a decoder with fingerprint ", {"decoder.path": str(make_decoder(8))})
    refused("config.evaluate.max_positions=-1: expected at least 0", {"evaluate.max_positions": -1})
    refused("config.evaluate.seed=-1: expected at least 0", {"evaluate.seed": -1})
    refused("config.evaluate.delay=31: expected at most 30", {"evaluate.delay": 31})
    refused("config.evaluate.batch_size=3 does not split over 8 devices", {"evaluate.batch_size": 3})


def test_a_tokenizer_that_was_exchanged(make_config, trained, decoder_folder, tmp_path):
    """By one with a field more, which SentencePiece does not know; the decoder's weights are the same."""
    other = shutil.copytree(decoder_folder, tmp_path / "other")
    (model := other / "tokenizer.model").write_bytes(model.read_bytes() + b"\xc2\x3e\x01a")
    config = make_config({"decoder.path": str(other), "data.token_files": ""})
    with pytest.raises(ld.UserError, match="config.decoder.tokenizer: .* was trained with another than .*other"):
        evaluate.evaluate(config, str(trained), str(tmp_path / "out"))

    checkpoints, _, meta = checkpoint.open_for_reading(str(trained))
    checkpoints.close()
    assert load.decoder_of(str(trained), meta) == str(decoder_folder)
    meta["config"]["decoder"]["path"] = str(other)
    with pytest.raises(ld.UserError, match="trained with another tokenizer than .*other/tokenizer.model"):
        load.decoder_of(str(trained), meta)

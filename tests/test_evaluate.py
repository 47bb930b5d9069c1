"""Perplexity n tokens ahead equals a naive sum, however it is batched and sharded."""

import contextlib
import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import package
import pytest
from naive_perplexity import MAX, A, ahead_logprobs, cut, everywhere, naive_rows, pooled

import latent_delib as ld
from latent_delib import convert, evaluate
from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment
from latent_delib.delib.methods import param_axes
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.job.record import Record
from latent_delib.lm import load
from latent_delib.machine import checkpoint
from latent_delib.measure import perplexity, values, views
from latent_delib.measure.text import read_validation_text
from latent_delib.nn import transformer
from latent_delib.results.evaluation import as_text
from tests.workdirs import flip

KEYS = [
    "n",
    "tokens",
    "decoder_ppl",
    "augmented_ppl",
    "change_percent",
    "change_low",
    "change_high",
]


@pytest.fixture(scope="module")
def pieces(documents):
    return cut(documents, MAX)


@pytest.fixture(scope="module")
def logprobs(trained_lm, pieces):
    return ahead_logprobs(trained_lm, pieces)


@pytest.fixture(scope="module")
def evaluated(make_config, trained, tmp_path_factory):
    """The result of the tiny config, the folder it was written to, and what was printed."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = evaluate.evaluate(make_config(), str(trained), str(out))
    return result, out, printed.getvalue()


def assert_same(rows, expected):
    """Perplexities to 1e-6 relative, so changes to a few 1e-4 of a percent; counts exactly."""
    assert len(rows) == A and all(set(KEYS) <= row.keys() for row in rows)
    assert all(row["change_low"] <= row["change_percent"] <= row["change_high"] for row in rows)
    rows, expected = np.array([[row[key] for key in KEYS[:5]] for row in rows]), np.array(expected)
    np.testing.assert_array_equal(rows[:, :2], expected[:, :2])
    np.testing.assert_allclose(rows[:, 2:4], expected[:, 2:4], rtol=1e-6)
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], atol=3e-4)


def test_a_checkpoint(trained, evaluated, logprobs, documents, pieces, trained_lm):
    result, out, _ = evaluated
    assert_same(result["rows"], pooled(logprobs, pieces, everywhere(pieces)))
    assert result["rows"][0]["tokens"] == sum(map(len, documents)) and len(pieces) > len(documents)
    assert abs(result["rows"][0]["change_percent"]) > 0.1  # latents do something

    assert sorted(path.name for path in out.iterdir()) == [
        "documents.npz",
        "perplexity.json",
        "perplexity.png",
    ]
    assert json.loads((out / "perplexity.json").read_text()) == result
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n")
    keys = {
        "rows",
        "sets",
        "documents",
        "pieces",
        "config",
        "checkpoint",
        "step",
        "fingerprint",
        "assistant",
        "architecture",
        "text",
        "provenance",
    }
    keys |= {"mean", "num_works", "interval_over", "draws", "start", "training"}
    assert set(result) == keys and set(result["provenance"]) == {
        "command",
        "date",
        "hardware",
        "versions",
        "commit",
    }
    assert result["pieces"] == len(pieces)
    assert (result["checkpoint"], result["step"]) == (str(trained / "checkpoints" / "4"), 4)
    assert result["fingerprint"] == trained_lm.decoder.fingerprint


def test_bfloat16_stays_near_float32(make_config, trained, evaluated, tmp_path):
    found = evaluate.evaluate(
        make_config({"compute.dtype": "bfloat16"}), str(trained), str(tmp_path)
    )
    for row, known in zip(found["rows"], evaluated[0]["rows"]):
        assert row["tokens"] == known["tokens"]
        for key in ("decoder_ppl", "augmented_ppl"):
            assert row[key] == pytest.approx(known[key], rel=0.003)
        assert row["change_percent"] == pytest.approx(known["change_percent"], abs=0.5)


def test_what_is_printed(make_config, evaluated, pieces):
    result, _, printed = evaluated
    heading, *table, head, first, second = printed.splitlines()[-9:]
    assert heading.endswith(f"{len(pieces)} pieces of 12 documents of 2 works")
    assert [line.split()[0] for line in table] == ["n", "1", "2", "4", "mean"] and (
        "interval over works" in table[0]
    )
    row = result["rows"][0]
    assert table[1].split()[3] == f"{row['augmented_ppl']:.4f}"
    for shown, line in ((row, table[1]), (result["mean"], table[-1])):
        interval = f"[{shown['change_low']:+.2f}, {shown['change_high']:+.2f}]"
        assert line.endswith(f"{shown['change_percent']:+.2f}%   {interval}")
    assert head.split() == "by work, intervals over its documents n = 1 n = 4".split()
    works = result["sets"][make_config().data.validation[0]]["works"]
    for line, (name, work) in zip((first, second), works.items(), strict=True):
        assert work["documents"] == 6 and work["interval_over"] == "documents of one work"
        label, change = line.split("documents")
        assert (
            label == f"  {name}, 6 "
            and change.split()[0] == f"{work['rows'][0]['change_percent']:+.2f}%"
        )
    assert sum(work["rows"][0]["tokens"] for work in works.values()) == row["tokens"]


def test_sums_of_each_document(make_config, evaluated, logprobs, documents, pieces):
    with np.load(evaluated[1] / "documents.npz") as file:
        saved = dict(file)
    assert saved["work"].tolist() == [0, 1] * 6 and saved["works"].tolist() == ["0.txt", "1.txt"]
    assert saved["source"].tolist() == [0] * len(documents)
    assert saved["sources"].tolist() == list(make_config().data.validation)
    tokens, decoder, augmented = (saved[name] for name in perplexity.Sums._fields)
    assert (tokens.dtype, decoder.dtype, augmented.dtype) == (np.int64, np.float64, np.float64)
    assert decoder.shape == augmented.shape == tokens.shape == (len(documents), A)
    assert tokens[:, 0].tolist() == [len(document) for document in documents]
    longest = int(np.argmax(tokens[:, 0]))
    its_pieces = cut([documents[longest]], MAX)
    chosen = [range(len(piece) if piece in its_pieces else 0) for piece in pieces]
    for n, count, plain, ours, _ in pooled(logprobs, pieces, chosen):
        assert tokens[longest, n - 1] == count
        assert np.exp(decoder[longest, n - 1] / count) == pytest.approx(plain, rel=1e-6)
        assert np.exp(augmented[longest, n - 1] / count) == pytest.approx(ours, rel=1e-6)


def add_up(exp, params, ahead=None):
    """Adds up the validation text on the mesh; `ahead` stands for the step of that name."""
    sharded = jax.device_put(
        params, mesh_lib.parameters(exp.mesh, params, param_axes(exp.aug.method))
    )
    sides = values.sides_of(
        {"decoder": sharded["decoder"]}, {"coprocessor": sharded["coprocessor"]}
    )
    steps = values.jit_steps(exp)
    if ahead is not None:
        steps = steps._replace(ahead=ahead(steps.ahead))
    text = read_validation_text(exp)
    view = views.view_of(exp, text)
    sums = perplexity.zeros(exp, text)
    batches = perplexity.batches_of(exp, text, view)
    assert sorted(np.concatenate(batches)) == list(range(len(text.pieces)))
    assert max(map(len, batches)) <= exp.config.evaluate.batch_size
    for numbers in batches:
        cases = [view(number) for number in numbers]
        perplexity.add_up(
            exp, sums, text.document[numbers], cases, values.values_of(exp, steps, sides, cases)
        )
    return perplexity.figures(sums, text.work, 0)["rows"]


@pytest.mark.parametrize("batch_size, positions", [(8, 8), (16, 2)])
def test_some_positions(make_config, trained_lm, logprobs, pieces, batch_size, positions):
    """They are those of a naive sum, on both sides, in any batches; no others are computed."""
    computed = []

    def counting(ahead):
        def call(params, reading, tokens, segment, at_BM, donor_B):
            computed.append(np.asarray(at_BM))
            return ahead(params, reading, tokens, segment, at_BM, donor_B)

        return call

    changes = {"evaluate.max_positions": 3, "evaluate.seed": 7, "evaluate.batch_size": batch_size}
    rows = add_up(
        experiment.read(make_config(changes | {"evaluate.positions": positions})),
        trained_lm.params,
        counting,
    )
    chosen = [views.positions(7, i, len(piece), 3, MAX) for i, piece in enumerate(pieces)]
    assert_same(rows, pooled(logprobs, pieces, chosen))
    assert max(at.shape[1] for at in computed) == min(positions, 3)
    at = np.concatenate([at.ravel() for at in computed])
    assert np.count_nonzero(at < MAX - 1) == sum(map(len, chosen))


def test_latents_behind_prompts_alone(
    make_config, trained, logprobs, pieces, tmp_path, monkeypatch
):
    config = make_config({"method.prompt_end": " a", "evaluate.max_positions": 3})
    (last,) = experiment.read(config).prompt_end
    chosen = [[t for t, token in enumerate(piece[:-1]) if token == last] for piece in pieces]
    assert sum(map(len, chosen)) > 20
    found = evaluate.evaluate(config, str(trained), str(tmp_path))
    assert_same(found["rows"], pooled(logprobs, pieces, chosen))
    experiment.read(config).record.require(Record.from_result(found), "same_curve", "itself")
    monkeypatch.setattr(evaluate, "values_of", None)  # nothing is computed before it is refused
    with pytest.raises(UserError, match="'zz' leave no token to count.* or longer texts"):
        evaluate.evaluate(make_config({"method.prompt_end": "zz"}), str(trained), str(tmp_path))


@pytest.mark.parametrize("method", ["cache_augmentation", "decoder"])
def test_a_longer_prompt_for_the_decoder_alone(
    make_config, trained, trained_lm, logprobs, pieces, tmp_path, method
):
    """The first tokens of a piece are lost to the evaluated model; both face the same tokens."""
    lost = 5
    plain = logprobs[0]
    ours = ahead_logprobs(trained_lm, [piece[:1] + piece[1 + lost :] for piece in pieces])[
        method != "decoder"
    ]
    changes = {"method.name": method, "evaluate.longer_prompt": lost}
    workdir = trained if method != "decoder" else tmp_path / "none"
    rows = evaluate.evaluate(make_config(changes), str(workdir), str(tmp_path / "out"))["rows"]
    for n, row in enumerate(rows, start=1):
        counted = [(b, t) for b, piece in enumerate(pieces) for t in range(lost, len(piece) - n)]
        nll = [
            np.mean([-x[b, t - shift, n - 1] for b, t in counted])
            for x, shift in ((plain, 0), (ours, lost))
        ]
        assert row["tokens"] == len(counted)
        np.testing.assert_allclose(
            [row["decoder_ppl"], row["augmented_ppl"]], np.exp(nll), rtol=1e-6
        )


# batch_size, positions, devices along data, fsdp, traces and tensor. The other tests split rows
# over eight devices.
SPLITS = {
    "widths, traces and heads": (4, 6, (1, 2, 2, 2)),
    "one device": (5, 7, (1, 1, 1, 1)),
}


@pytest.fixture(scope="module")
def overlay(decoder_folder, pieces):
    """An untrained overlay coprocessor of three latents, and its table."""
    decoder = ld.load_decoder(str(decoder_folder))
    lm = ld.AugmentedLM(decoder, ld.init_coprocessor(decoder, 3, "overlay", seed=5))
    return lm.params, naive_rows(lm, pieces)


@pytest.mark.parametrize(
    "name", ["widths, traces and heads", pytest.param("one device", marks=pytest.mark.slow)]
)
def test_independent_of_batches_and_devices(make_config, overlay, name):
    batch_size, positions, shape = SPLITS[name]
    changes = {"method.placement": "overlay", "method.num_latents": 3}
    changes |= {"evaluate.batch_size": batch_size, "evaluate.positions": positions}
    changes |= {f"mesh.{axis}": n for axis, n in zip(mesh_lib.AXES, shape)}
    params, expected = overlay
    exp = experiment.read(make_config(changes), jax.devices()[: np.prod(shape)])
    assert_same(add_up(exp, params), expected)


def test_the_decoder_needs_no_checkpoint(make_config, logprobs, pieces, tmp_path):
    config, nothing = make_config({"method.name": "decoder"}), str(tmp_path / "no job")
    with pytest.raises(ld.UserError, match="no job: "):
        evaluate.evaluate(config, nothing, str(tmp_path / "out"), step=3)
    result = evaluate.evaluate(config, nothing, str(tmp_path / "out"))
    plain = (logprobs[0], logprobs[0])
    assert_same(result["rows"], pooled(plain, pieces, everywhere(pieces)))
    assert result["checkpoint"] is None and not (tmp_path / "no job").exists()
    assert all(
        row["change_percent"] == 0 and row["augmented_ppl"] == row["decoder_ppl"]
        for row in result["rows"]
    )


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path, capsys):
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    older, newest = sorted(int(each.name) for each in (workdir / "checkpoints").iterdir())[-2:]
    flip(workdir / "checkpoints" / str(newest) / "trainable" / "manifest.ocdbt")
    convert.convert(str(workdir), str(tmp_path / "out"))
    assert (
        json.loads((tmp_path / "out" / "coprocessor.json").read_text())["record"]["step"] == older
    )
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().err


def test_an_exported_coprocessor_stands_for_its_workdir(make_config, trained, evaluated, tmp_path):
    where = str(tmp_path / "exported")
    convert.convert(str(trained), where)
    found = evaluate.evaluate(make_config(), where, str(tmp_path / "out"))
    result = evaluated[0]
    assert found["rows"] == result["rows"] and found["step"] == result["step"]
    assert found["checkpoint"] == where
    (tmp_path / "trained" / "checkpoints").parent.mkdir()
    (tmp_path / "trained" / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "trained" / "perplexity.json").write_text(json.dumps(result))
    convert.convert(str(tmp_path / "trained"), str(tmp_path / "with_card"))
    assert as_text(result) in (tmp_path / "with_card" / "README.md").read_text()
    other = result["config"] | {"seed": 7}  # of another training
    file = tmp_path / "trained" / "perplexity.json"
    file.write_text(json.dumps(result | {"config": other}))
    convert.convert(str(tmp_path / "trained"), str(tmp_path / "without_table"))
    assert as_text(result) not in (tmp_path / "without_table" / "README.md").read_text()
    with pytest.raises(UserError, match="num_latents is 2 there, 3 here"):
        evaluate.evaluate(make_config({"method.num_latents": 3}), where, str(tmp_path / "out"))
    flags = SimpleNamespace(
        step=None, steps="", watch=False, patience=evaluate.PATIENCE, workdir=where, out=""
    )
    with pytest.raises(UserError, match="--workdir=.*exported coprocessor; name an --out"):
        evaluate.main(flags)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_logits_divided_by_a_temperature(make_config, trained_lm, softcap):
    """Every term of a metric has them; a temperature of 1 changes no bit."""
    aug = experiment.read(make_config()).aug
    config = dataclasses.replace(aug.decoder.config, final_softcap=softcap)
    aug = dataclasses.replace(aug, decoder=aug.decoder.clone(config=config))
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 3, config.embed_dim)), jnp.float32)
    targets = jnp.asarray(draw.integers(0, config.vocab_size, (2, 3)), jnp.int32)
    arguments = aug, trained_lm.params, x, targets
    table_VD = transformer.output_table(trained_lm.params["decoder"])
    logp = jax.nn.log_softmax(transformer.unembed(table_VD, x, config) / 1.5)
    expected = -np.take_along_axis(np.asarray(logp), np.asarray(targets)[..., None], -1)[..., 0]
    found = augment.nll(*values.at_temperature(1.5, *arguments))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (augment.nll(*values.at_temperature(1.0, *arguments)) == augment.nll(*arguments)).all()


def test_a_temperature_near_one_is_not_rounded_away(make_config, trained_lm):
    """In bfloat16 1.003 would be 1."""
    aug = experiment.read(make_config({"compute.dtype": "bfloat16"})).aug
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(1, 64, aug.decoder.config.embed_dim)), jnp.bfloat16)
    targets = jnp.zeros((1, 64), jnp.int32)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained_lm.params)
    table_VD = transformer.output_table(params["decoder"])
    logits = transformer.unembed(table_VD, x.astype(jnp.float32), aug.decoder.config)
    expected = -jax.nn.log_softmax(logits / 1.003)[..., 0]
    found = augment.nll(*values.at_temperature(1.003, aug, params, x, targets))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_evaluation_at_a_temperature(make_config, trained, tmp_path):
    plain = evaluate.evaluate(make_config(), str(trained), str(tmp_path / "plain"))
    cooled = evaluate.evaluate(
        make_config({"evaluate.temperature": 2.0}), str(trained), str(tmp_path / "cooled")
    )
    assert ", all logits divided by 2, " in as_text(cooled) and "divided" not in as_text(plain)
    for name in ("decoder_ppl", "augmented_ppl"):
        assert abs(cooled["rows"][0][name] - plain["rows"][0][name]) > 1e-3
    older = json.loads(json.dumps(plain))
    del older["config"]["evaluate"]["temperature"]
    with pytest.raises(UserError, match="evaluate.temperature is 1.0 there, 2.0 here"):
        Record.from_result(cooled).require(Record.from_result(older), "same_curve", "itself")


def test_programs_are_shared(make_config):
    """Evaluations that are alike compile nothing anew; one that asks for something else does."""
    steps = values.jit_steps(experiment.read(make_config()))
    assert values.jit_steps(experiment.read(make_config({"evaluate.seed": 3}))) is steps
    assert values.jit_steps(experiment.read(make_config({"evaluate.delay": 2}))) is not steps


def test_bad_settings_write_nothing(make_config, trained, tmp_path):
    def refused(message, changes):
        with pytest.raises(ld.UserError, match=message) as caught:
            evaluate.evaluate(make_config(changes), str(trained), str(tmp_path / "out"))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("evaluate.max_positions=-1", {"evaluate.max_positions": -1})
    refused("evaluate.seed=-1", {"evaluate.seed": -1})
    refused("evaluate.delay=31", {"evaluate.delay": 31})
    refused("evaluate.temperature=0.0: expected more than 0", {"evaluate.temperature": 0.0})
    refused("longer_prompt=30", {"evaluate.longer_prompt": 30, "evaluate.max_pieces": 2})


def test_a_tokenizer_that_was_exchanged(make_config, trained, decoder_folder, tmp_path):
    """By one with a field that SentencePiece does not know; the decoder's weights are the same."""
    other = shutil.copytree(decoder_folder, tmp_path / "other")
    (model := other / "tokenizer.model").write_bytes(model.read_bytes() + b"\xc2\x3e\x01a")
    config = make_config({"decoder.path": str(other), "data.token_files": ""})
    with pytest.raises(ld.UserError, match="decoder.tokenizer"):
        evaluate.evaluate(config, str(trained), str(tmp_path / "out"))

    _, meta = checkpoint.open_for_reading(str(trained))
    assert load.decoder_of(str(trained), Record.from_meta(meta, "")) == str(decoder_folder)
    meta["config"]["decoder"]["path"] = str(other)
    with pytest.raises(ld.UserError, match="tokenizer"):
        load.decoder_of(str(trained), Record.from_meta(meta, ""))


def test_it_needs_no_language_model():
    """Nothing that `evaluate` imports, directly or not, imports what generates text."""
    sources = package.sources()
    needed, new = set(), {"evaluate"}
    while new:
        needed |= new
        dotted = {name for module in new for name in package.imports(sources[module], module)}
        paths = {name.removeprefix("latent_delib.").replace(".", "/") for name in dotted}
        paths |= {path.rpartition("/")[0] for path in paths}
        new = (paths & sources.keys()) - needed
    assert {"results/figures", "measure/values", "delib/step"} <= needed
    assert not {name for name in needed if name.startswith("lm/")}

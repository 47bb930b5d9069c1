"""The loss on held-out text during training: what it is, and that training does not feel it."""

import shutil
from functools import partial

import jax
import numpy as np
import pytest
import workdirs
from ml_collections import ConfigDict

import latent_delib as ld
from latent_delib import prepare, train
from latent_delib.data import batches
from latent_delib.delib import augment, traces
from latent_delib.errors import UserError
from latent_delib.job import experiment, parameters
from latent_delib.job import plan as planning
from latent_delib.job.validation import BATCHES, Validation, read_held_out

pytestmark = pytest.mark.usefixtures("shared_steps")
FIGURES = ("validation_loss", "validation_loss_decoder")


def rows_of(config, count=None):
    exp = experiment.read(config)
    count = count or BATCHES * config.train.batch_size
    return batches.validation_rows(config.data, tokenizer=exp.tokenizer, count=count)


def figures_of(workdir):
    """Step -> its figures of held-out text, of the steps that have some."""
    rows = [row for row in workdirs.rows_of(workdir) if FIGURES[0] in row]
    return {row["step"]: {name: row[name] for name in FIGURES if name in row} for row in rows}


@pytest.fixture(scope="module")
def validated(make_config, tmp_path_factory):
    """The workdir of the tiny job, with a validation every second step."""
    folder = tmp_path_factory.mktemp("validated")
    train.train(make_config({"train.validate_every": 2}), str(folder))
    return folder


@pytest.mark.slow
def test_training_does_not_feel_it(trained, validated):
    """Bit for bit; the plain decoder's figure is one number."""
    workdirs.assert_same(validated, trained)
    figures = figures_of(validated)
    assert list(figures) == [2, 4]
    assert len({row["validation_loss"] for row in figures.values()}) == 2
    assert len({row["validation_loss_decoder"] for row in figures.values()}) == 1
    (events,) = (validated / "tensorboard").iterdir()
    assert all(name.encode() in events.read_bytes() for name in FIGURES)


def test_it_is_what_the_model_in_use_says(make_config, validated):
    """Document by document, through `AugmentedLM`; those are padded, which causal models ignore."""
    config = make_config()
    T, A = config.data.seq_len, config.method.num_ahead
    rows = rows_of(config)
    documents, positions, left = [], [], []
    for number in range(BATCHES):
        here = slice(number * config.train.batch_size, (number + 1) * config.train.batch_size)
        tokens_BT, segment_BT = rows["tokens"][here], rows["segment"][here]
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        at_BM = traces.draw(key, tokens_BT, segment_BT, config.method.num_traces)
        for tokens, segment, at in zip(tokens_BT, segment_BT, np.array(at_BM)):
            for p in at[segment[at] > 0]:
                (inside,) = np.nonzero(segment == segment[p])
                documents.append(np.pad(tokens[inside], (0, T + A - len(inside))))
                positions.append(p - inside[0])
                left.append(min(A, inside[-1] - p))
    lm = ld.AugmentedLM(ld.load_decoder(config.decoder.path), ld.load_coprocessor(validated))
    counted = np.arange(A) < np.array(left)[:, None]
    assert counted.sum() > 100 and not counted.all()
    found = lm.ahead_logprobs(np.array(documents), np.array(positions)[:, None], ahead=A)
    decoder, augmented = (-np.array(each)[:, 0][counted].mean() for each in found)
    assert abs(decoder - augmented) > 1e-3
    expected = {"validation_loss": augmented, "validation_loss_decoder": decoder}
    assert figures_of(validated)[4] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_job_finds_the_same(trained, validated, make_config, tmp_path):
    workdirs.copy_at_step_2(trained, tmp_path / "workdir")  # trained without
    train.train(make_config({"train.validate_every": 2}), str(tmp_path / "workdir"))
    assert figures_of(tmp_path / "workdir") == {4: figures_of(validated)[4]}
    shutil.rmtree(tmp_path / "workdir" / "checkpoints" / "4")
    train.train(make_config({"train.validate_every": 3}), str(tmp_path / "workdir"))
    assert list(figures_of(tmp_path / "workdir")) == [3, 4], "and after the last step"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2},
        {"mesh.data": 2, "mesh.tensor": 2, "mesh.traces": 2, "train.accumulation": 2},
    ],
)
def test_it_is_the_same_however_it_is_computed(make_config, validated, changes):
    exp = experiment.read(make_config({"train.validate_every": 2} | changes))
    plan = planning.make(exp)
    shardings = planning.shardings_of(plan.state.trainable)
    weights = jax.device_put(workdirs.weights_of(validated, 4), shardings)
    frozen = parameters.load_frozen(exp)
    validation = Validation(exp, plan, read_held_out(exp), frozen, weights)
    found = validation(weights)
    assert found == pytest.approx(figures_of(validated)[4], rel=1e-5)


@pytest.mark.slow
def test_a_decoder_that_is_trained(make_config, tmp_path):
    """It is scored on all of the text, and has no other to compare with."""
    config = make_config({"method.name": "decoder", "train.validate_every": 1})
    train.train(config, str(tmp_path))
    figures = figures_of(tmp_path)
    assert all(list(row) == ["validation_loss"] for row in figures.values())
    lm = ld.AugmentedLM(ld.load_decoder(tmp_path / "decoder"), None)
    rows = rows_of(config)
    nats = []
    for tokens, segment in zip(rows["tokens"], rows["segment"]):
        for number in range(1, segment.max() + 1):
            document = tokens[segment == number]
            padded = np.pad(document, (0, config.data.seq_len - len(document)))
            logits = np.array(lm.logits(padded[None]))[0, : len(document) - 1]
            picked = logits[np.arange(len(logits)), document[1:]]
            nats += list(np.array(jax.nn.logsumexp(logits, axis=-1)) - picked)
    assert figures[4]["validation_loss"] == pytest.approx(np.mean(nats), rel=1e-5)


@pytest.mark.slow
def test_delays_and_other_methods(make_config):
    """A decoder that is trained too is no frozen one to compare with."""
    for changes, names in (
        ({"method.name": "joint"}, FIGURES[:1]),
        ({"method.max_delay": 3, "method.lora_rank": 2}, FIGURES),
    ):
        exp = experiment.read(make_config({"train.validate_every": 1} | changes))
        plan = planning.make(exp)
        state, frozen = train.place_state(exp, plan, None)
        validation = Validation(exp, plan, read_held_out(exp), frozen, state.trainable)
        found = validation(state.trainable)
        assert tuple(found) == names and all(map(np.isfinite, found.values()))


def test_token_files_and_text_give_the_same_rows(make_config, tmp_path):
    config = make_config()
    prepare.prepare(config, str(tmp_path / "tokens"))  # in the order of the files
    of_files = rows_of(make_config({"data.token_files": str(tmp_path / "tokens")}), 8)
    of_text = rows_of(make_config({"data.token_files": ""}), 8)
    for name in of_text:
        np.testing.assert_array_equal(of_files[name], of_text[name])


def test_rows_are_distinct_and_padding_comes_last(make_config):
    rows, all_rows = rows_of(make_config(), 8)["tokens"], rows_of(make_config(), 64)
    assert (rows[:, 0] == 2).all() and rows.shape == (8, 32)
    assert len(np.unique(rows, axis=0)) == 8
    assert contained(rows, all_rows["tokens"])
    filled = all_rows["segment"].any(axis=1)
    assert 8 < filled.sum() < 64 and not (filled[1:] & ~filled[:-1]).any()


def contained(rows, among):
    """Tells whether each row is one of others."""
    return {row.tobytes() for row in rows} <= {row.tobytes() for row in among}


@pytest.fixture
def large(tmp_path):
    """The source of a large file."""
    (tmp_path / "large.txt").write_text("a cat and a dog\n" * 100_000)
    return f"lines:{tmp_path}/large.txt"


@pytest.fixture
def rows_of_sources(make_config):
    """rows_of_sources(sources, count) -> rows of text that is not prepared."""

    def read(sources, count):
        exp = experiment.read(make_config())
        data = ConfigDict({**exp.config.data, "token_files": "", "validation": sources})
        return batches.validation_rows(data, tokenizer=exp.tokenizer, count=count)["tokens"]

    return read


def test_a_large_source_is_not_read_to_its_end(rows_of_sources, sources, large, monkeypatch):
    read, route = [], batches.validation_documents

    def counted(*args, **kwargs):
        for document in route(*args, **kwargs):
            read.append(document.source)
            yield document

    monkeypatch.setattr(batches, "validation_documents", counted)
    rows_of_sources((large, sources["validation"]), 8)
    assert len(read) < 2000
    read.clear()
    monkeypatch.setattr(batches, "MOST_READ", 16)
    rows_of_sources((large, sources["validation"]), 8)
    assert len(read) < 250, "at most 16 rows"


def test_sources_have_equal_shares_of_the_rows(rows_of_sources, sources, large):
    small = sources["validation"]
    of_large, of_small = np.split(rows_of_sources((large, small), 8), 2)
    alone = rows_of_sources((small,), 4)
    assert np.array_equal(of_small, alone) and not np.array_equal(of_large, alone)

    five, among = (small, small, small, small, large), rows_of_sources((small,), 64)
    rows = rows_of_sources(five, 8)  # 2, 2, 2, 1 and 1
    assert contained(rows[:-1], among) and not contained(rows[-1:], among)
    assert contained(rows_of_sources(five, 3), among), "more sources than rows"


def test_bad_held_out_text_is_refused_before_compiling(make_config, tmp_path, capsys):
    """Whether the decoder is frozen or trained."""
    for changes, words in (
        ({"train.validate_every": 3, "train.log_every": 2}, "validate_every=3.*log_every=2"),
        ({"train.validate_every": 1, "data.validation": ()}, "config.data.validation: empty"),
        (
            {"train.validate_every": 1, "method.prompt_end": "nowhere is this"},
            "config.data.validation: no token to predict after config.method.prompt_end='nowhere",
        ),
        (
            {
                "train.validate_every": 1,
                "method.prompt_end": "nowhere is this",
                "method.name": "decoder",
            },
            "config.data.validation: no token to predict",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train.train(make_config(changes), str(tmp_path))
        assert "compiled in" not in capsys.readouterr().out


def test_the_loss_without_latents_is_of_the_same_tokens(make_config):
    """Weights of `loss`, that is: as many tokens, also where documents end."""
    exp = experiment.read(make_config())
    rows = rows_of(make_config(), 8)
    tokens_BT, segment_BT = rows["tokens"], rows["segment"]
    at_BM = np.tile([0, 20, 30, 31], (8, 1))
    state, frozen = train.place_state(exp, planning.make(exp), None)

    def sums(aug):
        params = augment.assemble(frozen, state.trainable)
        found = partial(augment.loss, aug, params, num_ahead=3)
        return jax.jit(found)(tokens_BT=tokens_BT, segment_BT=segment_BT, at_BM=at_BM)

    (loss, count), (plain, same) = sums(exp.aug), sums(exp.aug.without_latents)
    assert loss != plain and count == same > 0


def test_text_that_is_missing_is_refused_before_weights_are_loaded(
    make_config, sources, tmp_path, monkeypatch
):
    config = make_config({"train.validate_every": 1})
    prepare.prepare(config, str(tmp_path / "tokens"))
    config.data.token_files = str(tmp_path / "tokens")
    config.data.validation = (f"{sources['validation']}x",)
    monkeypatch.delattr(train, "place_state")
    with pytest.raises(UserError, match=r"source '.*x' is not in .*tokens"):
        train.train(config, str(tmp_path / "run"))

"""A metric is one entry of `metric.METRICS`: what that gives, without a change anywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import evaluate
from latent_delib.delib import augment
from latent_delib.job import experiment
from latent_delib.measure import metric
from latent_delib.measure.metric import Metric, of_logits
from latent_delib.measure.perplexity import Sums, figures
from latent_delib.measure.text import read_validation_text
from latent_delib.results.evaluation import as_text

# of each piece of the vocabulary; any numbers serve
BYTES = np.random.default_rng(0).integers(1, 9, 320)


def is_first_choice(logits, targets):
    return logits.argmax(axis=-1) == targets


def log_probability(logits, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


ACCURACY = Metric(
    "accuracy", {"hits": of_logits(is_first_choice)}, lambda sums: sums["hits"] / sums["tokens"]
)
BITS_PER_BYTE = Metric(
    "bits_per_byte",
    {
        "nll": augment.nll,
        "bytes": lambda aug, params, x, targets: jnp.asarray(BYTES, jnp.float32)[targets],
    },
    lambda sums: sums["nll"] / sums["bytes"] / np.log(2),
)
LIKELIHOOD = Metric(
    "likelihood",
    {"log": of_logits(log_probability)},
    lambda sums: np.exp(sums["log"] / sums["tokens"]),
)


def test_new_metrics(make_config, trained, decoder_folder, tmp_path, monkeypatch):
    known = evaluate.evaluate(make_config(), str(trained), str(tmp_path / "known"))
    monkeypatch.setattr(metric, "METRICS", (*metric.METRICS, ACCURACY, BITS_PER_BYTE, LIKELIHOOD))
    result = evaluate.evaluate(make_config(), str(trained), str(tmp_path / "more"))

    text = read_validation_text(experiment.read(make_config()))
    tokens_BT = np.zeros((len(text.pieces), 32), np.int32)
    for row, piece in zip(tokens_BT, text.pieces):
        row[: len(piece)] = piece
    logits_BTV = ld.AugmentedLM(ld.load_decoder(str(decoder_folder))).logits(tokens_BT)
    choices_BT = np.argmax(logits_BTV, axis=-1)
    for row, before in zip(result["rows"], known["rows"]):
        n = row["n"]
        assert before.items() <= row.items()
        # The n-th token ahead is every token of a piece but BOS and the n - 1 after it.
        targets = np.concatenate([piece[n:] for piece in text.pieces])
        choices = np.concatenate(
            [choices_BT[i, n - 1 : len(piece) - 1] for i, piece in enumerate(text.pieces)]
        )
        assert row["decoder_accuracy"] == np.mean(targets == choices)
        assert 0 <= row["augmented_accuracy"] <= 1
        for side in ("decoder", "augmented"):
            nats = np.log(row[f"{side}_ppl"]) * row["tokens"]
            assert row[f"{side}_bits_per_byte"] == pytest.approx(
                nats / BYTES[targets].sum() / np.log(2)
            )
            assert row[f"{side}_likelihood"] == pytest.approx(1 / row[f"{side}_ppl"], rel=1e-6)
    head, first = as_text(result).splitlines()[1:3]
    assert head.endswith("; accuracy; bits_per_byte; likelihood")
    found = result["rows"][0]
    _, accuracy, *_ = first.split("; ")
    assert accuracy == f"{found['decoder_accuracy']:.4g} {found['augmented_accuracy']:.4g}"
    assert "accuracy" not in as_text(known)  # evaluated before there was this metric
    with np.load(tmp_path / "more" / "documents.npz") as sums:
        nll = Sums(*(sums[name] for name in Sums._fields))
        assert "decoder_accuracy" not in figures({"nll": nll}, sums["work"], seed=0)["rows"][0]
        hits = sums["decoder_hits"][:, 0].sum()
        assert hits == result["rows"][0]["decoder_accuracy"] * sums["tokens"][:, 0].sum()

"""A run that version 0.1 left resumes, evaluates and loads.

It has two steps of four. Commit cb876be has the script that made it, tests/golden/make_run.py.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import workdirs

import latent_delib as ld
from configs import base
from latent_delib import evaluate, train
from latent_delib.convert import convert
from latent_delib.job.record import Record

ARCHIVE = Path(__file__).parent / "golden" / "version_0_1.tar.gz"
CHANGES = {  # paths are relative to the run's folder
    "decoder.path": "decoder",
    "method.num_latents": 2,
    "method.num_traces": 2,
    "method.num_ahead": 2,
    "data.sources": ("files:train.txt",),
    "data.validation": ("files:validation.txt",),
    "data.token_files": "tokens",
    "data.seq_len": 16,
    "optimizer.learning_rate": 1e-2,
    "optimizer.soft_token_learning_rate": 1e-2,
    "optimizer.warmup_steps": 1,
    "optimizer.eps": 1e-3,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "compute.loss_chunk": 8,
    "evaluate.num_ahead": 2,
    "evaluate.max_length": 16,
    "evaluate.positions": 8,
}


def make_config():
    """Returns the run's config."""
    config = base.get_config()
    config.update_from_flattened_dict(CHANGES)
    return config.lock()


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """Goes to a copy of the run; returns what version 0.1 computed with it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_it_is_read_as_it_was(expected):
    meta = workdirs.meta_of("workdir")
    assert "format" not in meta
    record = Record.from_meta(meta, "workdir")
    assert (record.step, record["method.num_latents"], record["decoder.path"]) == (2, 2, "decoder")

    result = evaluate.evaluate(make_config(), "workdir", "out")
    for key in ("decoder_ppl", "augmented_ppl", "tokens"):
        np.testing.assert_allclose(
            [r[key] for r in result["rows"]], [r[key] for r in expected["rows"]], rtol=1e-5
        )

    lm = ld.AugmentedLM(ld.load_decoder("decoder"), ld.load_coprocessor("workdir"))
    assert lm.latents([[2, 300 - 1, 5]], [[2]]).shape == (1, 1, 2, 8)


def test_it_is_exported_without_its_evaluation(expected):
    """Version 0.1 did not write how its intervals came about."""
    Path("workdir/perplexity.json").write_text(json.dumps({"step": 2, "rows": []}))
    convert("workdir", "exported")
    assert "perplexity" not in Path("exported/README.md").read_text()


@pytest.mark.slow
def test_it_resumes(expected):
    train.train(make_config(), "workdir")
    losses = [row["loss"] for row in workdirs.rows_of("workdir")]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    assert workdirs.meta_of("workdir")["format"] == 1

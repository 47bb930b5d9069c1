"""A run that version 0.1 left resumes, evaluates and loads."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import workdirs

import latent_delib as ld
from latent_delib import evaluate, train
from latent_delib.convert import convert
from latent_delib.job.record import Record
from tests.golden import make_run

ARCHIVE = Path(__file__).parent / "golden" / "version_0_1.tar.gz"


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

    result = evaluate.evaluate(make_run.make_config(), "workdir", "out")
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


def test_it_resumes(expected):
    train.train(make_run.make_config(), "workdir")
    losses = [row["loss"] for row in workdirs.rows_of("workdir")]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    assert workdirs.meta_of("workdir")["format"] == 1

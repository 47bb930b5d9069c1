"""A workdir: its lock, and the steps that are saved in it."""

import errno
import fcntl
import os

import pytest
from etils import epath

from latent_delib import benchmark
from latent_delib.errors import Outage, UserError
from latent_delib.job import build
from latent_delib.machine import saved_steps, workdir
from latent_delib.measure import evaluations, perplexity


def test_a_disk_without_locks_is_not_another_job(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="cannot be locked .No locks available.; .* another disk"):
        with workdir.exclusive(str(tmp_path)):
            pass


def test_a_store_that_is_not_supported(tmp_path, monkeypatch):
    """Otherwise a Python caller's results would lie in a local folder named s3:."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir=s3://b/run: expected a local path or gs://"):
        with workdir.exclusive("s3://b/run"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_store_that_does_not_answer_as_steps_are_looked_for(tmp_path, monkeypatch):
    """The clients of stores answer is_dir() with no then; a job would begin at step 0."""

    def fails(*_):
        raise ValueError("UNAVAILABLE: all 33 retries failed")

    monkeypatch.setattr(type(epath.Path("/")), "exists", fails)
    monkeypatch.setattr(type(epath.Path("/")), "is_dir", lambda *_: False)
    for look in (saved_steps.whole_steps, saved_steps.is_begun, saved_steps.read_meta):
        with pytest.raises(Outage):
            look(str(tmp_path))
    with pytest.raises(Outage):
        next(evaluations.steps_to_evaluate(str(tmp_path), epath.Path("none"), None, 1.0))
    with pytest.raises(Outage):  # exit code 69, so that a launcher starts the job again
        build.step_of_decoder(str(tmp_path))
    with pytest.raises(Outage):
        perplexity.PartialSums(epath.Path(tmp_path) / "partial.npz", []).restore({})
    with pytest.raises(Outage):
        evaluations.read_results(epath.Path(tmp_path))
    with pytest.raises(Outage):
        benchmark._read_rows(epath.Path(tmp_path) / "benchmarks.json", None)


@pytest.mark.parametrize("name, found", [("read_text", Outage), (None, UserError)])
def test_a_meta_that_cannot_be_read(tmp_path, monkeypatch, name, found):
    """A store that does not answer is told; a damaged file leaves nothing that says more."""

    def fails(*args):
        raise ValueError("UNAVAILABLE: all 33 retries failed")

    meta = tmp_path / "checkpoints" / "3" / "meta"
    meta.mkdir(parents=True)
    (meta / "metadata").write_text("{")
    if name:
        monkeypatch.setattr(type(epath.Path("/")), name, fails)
    with pytest.raises(found):
        saved_steps.read_meta(str(tmp_path))

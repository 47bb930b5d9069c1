"""A workdir: its lock, and the steps that are saved in it."""

import errno
import fcntl
import os

import pytest

from latent_delib.errors import Outage, UserError
from latent_delib.machine import saved_steps, workdir


def test_a_disk_without_locks_is_not_another_job(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="cannot be locked .No locks available.; .* another disk"):
        with workdir.exclusive(str(tmp_path)):
            pass


def test_a_store_that_does_not_answer_as_steps_are_looked_for(monkeypatch):
    class Folder:
        def is_dir(self):
            raise ValueError("UNAVAILABLE: all 33 retries failed")

    monkeypatch.setattr(saved_steps, "folder", lambda workdir: Folder())
    with pytest.raises(Outage):
        saved_steps.whole("gs://bucket/run")

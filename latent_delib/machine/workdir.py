"""Holds a workdir for one job."""

import contextlib
from collections.abc import Iterator

import jax

from latent_delib.errors import UserError
from latent_delib.machine import files


def is_remote(workdir: str) -> bool:
    """Returns whether a workdir is in a bucket."""
    return workdir.startswith("gs://")


@contextlib.contextmanager
def exclusive(workdir: str) -> Iterator[None]:
    """Holds a local workdir for one job, by a lock of process 0.

    Raises:
      UserError: as `files.locked`; or the workdir is in a store other than gs://.
    """
    if is_remote(workdir) or jax.process_index():
        yield
        return
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: expected a local path or gs://BUCKET/PATH")
    with files.locked(workdir, f"--workdir={workdir}"):
        yield

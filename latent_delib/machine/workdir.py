"""Holds a workdir for one job."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from latent_delib.errors import UserError, reason
from latent_delib.machine import files


def is_remote(workdir: str) -> bool:
    """Returns whether a workdir is in a bucket."""
    return workdir.startswith("gs://")


@contextlib.contextmanager
def exclusive(workdir: str) -> Iterator[None]:
    """Holds a local workdir for one job: process 0 has a lock, which ends with the process.

    Raises:
      UserError: another job holds the workdir; it cannot be written or locked; or it is in a store
        other than gs://.
    """
    if is_remote(workdir) or jax.process_index():
        yield
        return
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: expected a local path or gs://BUCKET/PATH")
    try:
        files.make_folder(Path(workdir))
        lock = open(Path(workdir) / ".lock", "a+")
    except (UserError, OSError) as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({reason(error)})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"--workdir={workdir}: in use by another job (process {lock.read().strip()})"
            ) from None
        except OSError as error:  # as on NFS without lockd
            raise UserError(
                f"--workdir={workdir}: cannot be locked ({reason(error)}); "
                "name a folder on another disk"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield

"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from latent_delib.errors import UserError


def write(path: epath.Path, content: bytes) -> None:
    """A file, local or on gs://, under its name only once whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (partial := path.parent / f".{path.name}.tmp-{os.getpid()}").write_bytes(content)
    partial.replace(path)


@contextlib.contextmanager
def whole(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A new local folder to write in that appears under its name only once whole, and leaves nothing if that fails.

    Raises:
      UserError: it is there already, and is not to be replaced; or it cannot be renamed to: gs:// and the like, a mount
        point.
    """
    if str(folder).partition("/")[0].endswith(":"):
        raise UserError(f"{folder}: expected a local folder; copy it from there")
    if folder.is_mount():
        raise UserError(f"{folder}: a mount point cannot be put in place whole; name a folder in it")
    if folder.exists() and not replace and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists; remove it or name another")
    partial, before = (folder.with_name(f"{folder.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if replace and folder.exists():
            folder.rename(before)
        try:
            partial.rename(folder)
        except OSError as error:
            if before.exists():
                before.rename(folder)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(f"{folder}: made by another job meanwhile") from None
            raise
    finally:
        for leftover in (partial, before):
            shutil.rmtree(leftover, ignore_errors=True)

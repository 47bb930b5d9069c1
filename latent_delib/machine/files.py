"""Makes files and folders that appear whole or not at all."""

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from latent_delib.errors import Outage, UserError, reason, store_error

NOT_A_FOLDER = "is a file, expected a folder"
HOST = re.sub(r"\W", "_", socket.gethostname())


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically, local or on gs://, and makes its folder."""
    if "://" in str(path):  # a store shows whole files only
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except Exception as error:  # a store's client raises exceptions of any kind
            raise store_error(error, path) or error from None
        return
    path = Path(path)
    make_folder(path.parent)
    with _beside(path) as partial:
        partial.write_bytes(content)
        partial.replace(path)


@contextlib.contextmanager
def whole(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `folder` on success, and is removed on failure.

    Raises:
      UserError: the folder is there already, and `replace` is not set; or it is on gs:// or a mount
        point.
      OSError: with the folder's name, where the disk is full or not writable.
    """
    if str(folder).partition("/")[0].endswith(":"):
        raise UserError(f"{folder}: expected a local folder; copy it from there")
    if folder.is_mount():
        raise UserError(
            f"{folder}: a mount point cannot be put in place whole; name a folder in it"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: {NOT_A_FOLDER}; name another")
    if folder.exists() and not replace and any(folder.iterdir()):
        raise UserError(f"{folder}: already exists and is not empty; name another")
    make_folder(folder.parent)
    with _beside(folder) as partial:
        partial.mkdir()
        yield partial
        if replace and folder.exists():
            _replace(folder, partial)
            return
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(f"{folder}: made by another job meanwhile") from None
            raise


def _replace(folder: Path, partial: Path) -> None:
    """Puts a folder in the place of one that is there; if that fails, the old one comes back."""
    with _beside(folder) as before:
        folder.rename(before)
        try:
            partial.rename(folder)
        except OSError:
            before.rename(folder)
            raise


def make_folder(path: Path) -> None:
    """Makes a local folder and those above it, unless they are there.

    Raises:
      UserError: a file is in the place of one of them.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{in_the_way(path) or path}: {NOT_A_FOLDER}") from None


def in_the_way(path: Path) -> Path | None:
    """Returns the file in the place of a folder, or of one above it; None without one."""
    return next((each for each in (path, *path.parents) if each.is_file()), None)


@contextlib.contextmanager
def named(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Puts `path` into errors that name no path, or one that begins with `partial`."""
    try:
        yield
    except UserError as error:
        if partial is None:
            raise
        raise UserError(str(error).replace(str(partial), str(path))) from None
    except OSError as error:
        inside = partial is not None and str(error.filename).startswith(str(partial))
        if error.filename is not None and not inside:
            raise
        kind = Outage if isinstance(error, Outage) else OSError
        raise kind(error.errno, error.strerror or str(error), str(path)) from None


class StoredLines:
    """Writes lines to a file on a store, where nothing can be appended.

    Each write is of the whole file, in a thread. While it goes on, lines wait for the next. A
    failed write does not end the job: it is reported once, and the next line or `close` tries
    again.
    """

    def __init__(self, path: epath.Path, lines: list[str]):
        self.path = path
        self.lines = lines
        self.writing = threading.Thread()
        self.warned = False

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        if not self.writing.is_alive():
            self.writing = threading.Thread(
                target=self._put, args=["".join(self.lines)], daemon=True
            )
            self.writing.start()

    def close(self) -> None:
        if self.writing.is_alive():
            self.writing.join()
        self.warned = False
        self._put("".join(self.lines))

    def _put(self, text: str) -> None:
        try:
            self.path.write_text(text)
        except Exception as error:  # a store's client raises exceptions of any kind
            if not self.warned:
                text = f"{self.path}: not written ({reason(error)}); the job goes on"
                print(f"warning: {text}", file=sys.stderr, flush=True)
            self.warned = True


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields a new name beside `path`, and removes what is there at the end.

    Leftovers of killed processes are removed first. Those of other machines stay, whose processes
    are not seen here.
    """
    here = path.absolute()
    prefix = f"{here.name}.tmp-{HOST}-"
    for leftover in here.parent.glob(f"{glob.escape(prefix)}*-*"):
        process = leftover.name.split("-")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            _remove(leftover)
    partial = here.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with named(path, partial):
            yield partial
    finally:
        _remove(partial)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # or it is another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

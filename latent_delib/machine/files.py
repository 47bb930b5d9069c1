"""Makes files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
from etils import epath

from latent_delib.errors import Outage, UserError, reason, store_errors

# Without TensorFlow epath reads gs:// through gcsfs, which would list each folder only once.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

LOCK = ".lock"  # a file in a folder that one job at a time may use
NOT_A_FOLDER = "is a file, expected a folder"
HOST = re.sub(r"\W", "_", socket.gethostname())


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically, local or on gs://, and makes its folder."""
    if "://" in str(path):  # a store shows whole files only
        with store_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return
    path = Path(path)
    make_folder(path.parent)
    with _beside(path) as partial:
        partial.write_bytes(content)
        partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      UserError: the file does not exist, or holds anything else.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds {type(fields).__name__}, expected an object")
    return fields


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Reads a text file.

    Raises:
      UserError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def check_free(folder: Path, replace: bool = False) -> None:
    """Checks that `atomic_folder` can make a folder, before the work that fills it.

    Raises:
      UserError: the folder exists, is not empty, and `replace` is not set; or it is a file, a mount
        point or on gs://.
    """
    if str(folder).partition("/")[0].endswith(":"):
        given = str(folder).replace(":/", "://", 1)
        raise UserError(f"{given}: expected a local folder; write to one, then copy it to {given}")
    if folder.is_mount():
        raise UserError(f"{folder}: a mount point cannot be replaced; name a folder in it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: {NOT_A_FOLDER}; name another")
    if folder.exists() and not replace and any(folder.iterdir()):
        raise UserError(f"{folder}: already exists and is not empty; name another")


@contextlib.contextmanager
def atomic_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `folder` on success, and is removed on failure.

    Raises:
      UserError: as `check_free`; or a file is in place of a folder above, or another job has made
        the folder.
      OSError: the disk is full or not writable; the error names the folder.
    """
    if folder.is_symlink():
        folder = folder.resolve()  # the link stays; its target may be on another disk
    check_free(folder, replace)
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
    """Replaces an existing folder by another; if that fails, the old folder comes back.

    Meanwhile the old folder has a temporary name. In the end it is removed.
    """
    with _beside(folder) as before:
        folder.rename(before)
        try:
            partial.rename(folder)
        except BaseException:  # Ctrl-C too, which may come when the new folder is in place
            if not folder.exists():
                before.rename(folder)
            raise


@contextlib.contextmanager
def locked(folder: str, named: str) -> Iterator[None]:
    """Holds a local folder, which is made if need be, for one job; a lock ends with its process.

    Args:
      folder: the folder.
      named: its name in errors, such as "--workdir=FOLDER".

    Raises:
      UserError: another job holds the folder; or it cannot be written or locked.
    """
    try:
        make_folder(Path(folder))
        lock = open(Path(folder) / LOCK, "a+")
    except (UserError, OSError) as error:
        raise UserError(f"{named}: cannot be written ({reason(error)})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            process = lock.read().strip()
            raise UserError(f"{named}: in use by another job (process {process})") from None
        except OSError as error:  # as on NFS without lockd
            raise UserError(
                f"{named}: cannot be locked ({reason(error)}); name a folder on another disk"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def make_folder(path: Path) -> None:
    """Makes a local folder and the folders above it, unless they exist.

    Raises:
      UserError: a file is in place of one of these folders.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = in_the_way(path)
        if file is None:
            raise UserError(f"{path}: is a link to nothing, expected a folder") from None
        raise UserError(f"{file}: {NOT_A_FOLDER}") from None


def is_folder(path: epath.Path) -> bool:
    """Returns whether a folder exists, local or on a store.

    Where a store does not answer, `is_dir` says no; `exists` raises.

    Raises:
      OSError: the disk or store fails (Outage: the store does not answer).
    """
    with store_errors(path):
        return path.exists() and path.is_dir()


def check_writable(folder: str) -> None:
    """Checks that a local folder can be written or made, before work whose results go there.

    Raises:
      UserError: a file is in place of the folder or of one above it; or the folder, or the nearest
        one above it that exists, cannot be written.
    """
    if "://" in folder:
        return
    path = Path(folder)
    if in_the_way(path):
        raise UserError(f"{in_the_way(path)}: {NOT_A_FOLDER}")
    there = next(each for each in (path, *path.parents) if each.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: cannot be written; name another folder")


def in_the_way(path: Path) -> Path | None:
    """Returns the file that is in place of a folder or of one above it; None if there is none."""
    return next((each for each in (path, *path.parents) if each.is_file()), None)


@contextlib.contextmanager
def path_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Puts `path` into errors that name no path, or a path that begins with `partial`."""
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


class Copy:
    """Keeps a copy of a growing local file on a store, where nothing can be appended.

    Each copy is of the whole file, and is made in a thread. While it is being made, `update` does
    nothing. A copy that fails does not end the job: it is reported once, and the next `update` or
    `close` tries again.
    """

    def __init__(self, source: Path, target: epath.Path):
        self.source = source
        self.target = target
        self.copying = threading.Thread()
        self.warned = False

    def update(self) -> None:
        if not self.copying.is_alive():
            self.copying = threading.Thread(target=self._copy, daemon=True)
            self.copying.start()

    def close(self) -> None:
        if self.copying.is_alive():
            self.copying.join()
        self.warned = False
        self._copy()

    def _copy(self) -> None:
        try:
            self.target.write_bytes(self.source.read_bytes())
        except Exception as error:  # a store's client raises exceptions of any kind
            if not self.warned:
                text = f"{self.target}: not written ({reason(error)}); the job goes on"
                print(f"warning: {text}", file=sys.stderr, flush=True)
            self.warned = True


@contextlib.contextmanager
def uploaded_folder(folder: epath.Path, last: str) -> Iterator[Path]:
    """Yields a temporary local folder; on success its files replace those of `folder` on a store.

    last: the file whose presence tells that the folder is whole; see `upload`, also for errors.
    """
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        upload(Path(temporary), folder, last)


def upload(folder: Path, target: epath.Path, last: str = "") -> None:
    """Copies the files of a local folder to another folder, local or on a store, part by part.

    Args:
      last: a file that is removed from `target` first, and copied after all others.

    Raises:
      OSError: the store failed; an Outage where it does not answer.
    """
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names.sort(key=lambda name: str(name) == last)
    with store_errors(target):
        if last:
            (target / last).unlink(missing_ok=True)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("rb") as source, (target / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 16 << 20)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields a new path beside `path`; in the end removes the file or folder of that name, if any.

    Leftovers of killed processes are removed first. Leftovers of other machines stay, because their
    processes cannot be seen from this machine.
    """
    here = path.absolute()
    prefix = f"{here.name}.tmp-{HOST}-"
    for leftover in here.parent.glob(f"{glob.escape(prefix)}*-*"):
        process = leftover.name.split("-")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            _remove(leftover)
    partial = here.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with path_errors(path, partial):
            yield partial
    finally:
        _remove(partial)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # other errors: the process is another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):  # a read-only disk refuses to remove what is not there
        path.unlink(missing_ok=True)

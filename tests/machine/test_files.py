"""Files and folders that appear whole or not at all, whoever dies on the way."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latent_delib import errors
from latent_delib.errors import Outage, UserError
from latent_delib.machine import files

KILLED = """
import os, signal, sys
from pathlib import Path
from latent_delib.machine import files

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

with files.atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "weights").write_text("begun")
    Path.replace = killed
    files.write(Path(sys.argv[2]), b"begun")
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_leaves_is_removed_at_the_next_start(tmp_path):
    out, table = tmp_path / "out", tmp_path / "table.md"
    done = subprocess.run([sys.executable, "-c", KILLED, out, table], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    dead = names(tmp_path)[0].split("-")[-2]
    # whose processes are not seen here
    elsewhere = tmp_path / f"out.tmp-another_host-{dead}-12345678"
    elsewhere.mkdir()
    files.write(table, b"whole")
    with files.atomic_folder(out) as partial:
        (partial / "weights").write_text("whole")
    assert names(tmp_path) == ["out", elsewhere.name, "table.md"]
    assert (out / "weights").read_text() == "whole" and table.read_bytes() == b"whole"


def test_nothing_of_a_living_job_is_removed(tmp_path):
    with pytest.raises(UserError, match="out: made by another job meanwhile"):
        with files.atomic_folder(tmp_path / "out") as slow:
            (slow / "weights").write_text("slow")
            with files.atomic_folder(tmp_path / "out") as fast:
                (fast / "weights").write_text("fast")
            assert (slow / "weights").read_text() == "slow"
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "weights").read_text() == "fast"


def test_who_may_read_a_file_or_folder_is_left_to_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "file", b"")
        with files.atomic_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "out")] == [0o640, 0o750]


@pytest.fixture
def small_files():
    """No file can grow beyond 4096 bytes, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_of_with_the_path_that_the_user_gave(tmp_path, small_files):
    with pytest.raises(OSError, match="File too large") as error:
        files.write(tmp_path / "table.md", bytes(5000))
    assert error.value.filename == str(tmp_path / "table.md")
    with (
        pytest.raises(OSError, match="File too large") as error,
        files.atomic_folder(tmp_path / "out") as partial,
    ):
        (partial / "weights").write_bytes(bytes(5000))
    assert error.value.filename == str(tmp_path / "out")
    with pytest.raises(Outage) as error, files.atomic_folder(tmp_path / "out"):
        raise Outage(errno.ECONNABORTED, "UNAVAILABLE")
    assert error.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_mistake_is_no_outage(tmp_path):
    """Whatever words are in its message."""
    with pytest.raises(UserError), errors.store_errors(tmp_path):
        raise UserError("/data/connection: is empty")


def test_a_temporary_name_is_nobody_s_business(tmp_path):
    with pytest.raises(OSError) as error, files.atomic_folder(tmp_path / "out") as partial:
        (partial / "there" / "is" / "no folder").write_text("")
    assert error.value.filename == str(tmp_path / "out")
    with (
        pytest.raises(UserError, match=f"^{tmp_path}/out/tokens: full$"),
        files.atomic_folder(tmp_path / "out") as partial,
    ):
        raise UserError(f"{partial}/tokens: full")
    with pytest.raises(OSError) as error, files.atomic_folder(tmp_path / "out"):
        (tmp_path / "source").read_bytes()  # not what is written
    assert error.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_a_link_to_a_folder_stays_and_its_folder_is_made(tmp_path, is_there, replace):
    target = tmp_path / "disk" / "out"
    if is_there:
        target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    with files.atomic_folder(tmp_path / "link", replace) as partial:
        assert partial.parent == target.parent
        (partial / "weights").write_text("whole")
    assert names(target) == ["weights"] and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["disk", "link"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("is_renamed", [False, True])
def test_an_interrupt_during_a_replacement_loses_no_folder(tmp_path, monkeypatch, is_renamed):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    rename = Path.rename

    def interrupted(self, target):
        if not (self / "new").exists():
            return rename(self, target)
        if is_renamed:
            rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with files.atomic_folder(tmp_path / "a", replace=True) as partial:
            (partial / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    expected = ["new"] if is_renamed else ["old"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == expected


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path):
    """The folder is replaced whole, or not at all."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with pytest.raises(OSError, match="disk"), files.atomic_folder(tmp_path / "a", replace=True):
        raise OSError("the disk is full")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]
    with files.atomic_folder(tmp_path / "a", replace=True) as partial:
        (partial / "new").write_text("")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(UserError, match="a mount point"), files.atomic_folder(tmp_path):
        raise AssertionError


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for path, words in (
        ("full", "already exists and is not empty; name another"),
        ("file", "is a file, expected a folder; name another"),
    ):
        with (
            pytest.raises(UserError, match=f"{path}: {words}"),
            files.atomic_folder(tmp_path / path),
        ):
            pass
    for path in ("file/out", "file/more/out"):
        with (
            pytest.raises(UserError, match="file: is a file, expected a folder"),
            files.atomic_folder(tmp_path / path),
        ):
            pass
        with pytest.raises(UserError, match="file: is a file, expected a folder"):
            files.write(tmp_path / path, b"")
    assert names(tmp_path) == ["file", "full"]


def test_a_read_only_disk_is_told_of_with_the_path_that_the_user_gave(tmp_path, monkeypatch):
    """There the removal of what does not exist fails too."""

    def fail(path, *_, **__):
        if path != tmp_path:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "unlink", "write_bytes"):
        monkeypatch.setattr(Path, name, fail)
    with pytest.raises(OSError) as error, files.atomic_folder(tmp_path / "out"):
        pass
    assert error.value.filename == str(tmp_path / "out")
    with pytest.raises(OSError) as error:
        files.write(tmp_path / "file", b"")
    assert error.value.filename == str(tmp_path / "file")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """As root every folder can be, so the answer is pretended."""
    files.check_writable("gs://bucket/new")
    files.check_writable(f"{tmp_path}/new/newer")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}/new/newer: cannot be written; name another"):
        files.check_writable(f"{tmp_path}/new/newer")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file: is a file, expected a folder"):
        files.check_writable(f"{tmp_path}/file/new")


def test_a_store_that_does_not_take_a_file():
    """An outage is one, whatever the client raises; a store's other failures are a disk's."""

    class Stored:
        parent = property(lambda self: self)

        def __init__(self, error):
            self.error = error

        def __str__(self):
            return "gs://bucket/perplexity.json"

        def mkdir(self, **options):
            raise self.error

    with pytest.raises(Outage, match="gs://bucket/perplexity.json"):
        files.write(Stored(ValueError("UNAVAILABLE: all 33 retries failed")), b"")
    with pytest.raises(PermissionError):
        files.write(Stored(RuntimeError("403 Forbidden")), b"")
    with pytest.raises(TypeError):
        files.write(Stored(TypeError("a bug")), b"")

    class HttpError(Exception):  # as gcsfs raises it
        def __init__(self, code):
            super().__init__(f"as the server says, {code}")
            self.code = code

    class ServerDisconnectedError(Exception):
        pass

    with pytest.raises(Outage, match="gs://bucket/perplexity.json"):
        files.write(Stored(HttpError(503)), b"")
    with pytest.raises(Outage):
        files.write(Stored(ServerDisconnectedError()), b"")
    with pytest.raises(PermissionError):
        files.write(Stored(HttpError(401)), b"")
    with pytest.raises(HttpError):
        files.write(Stored(HttpError(400)), b"")


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link: is a link to nothing, expected a folder"):
        files.make_folder(tmp_path / "link")

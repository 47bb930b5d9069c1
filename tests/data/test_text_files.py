"""Files of text: a digest of them; those on gs:// hold what local ones hold."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from latent_delib.data import text
from latent_delib.errors import Outage, UserError
from tests import fake_gcs

ROOT = Path(__file__).resolve().parents[2]
PATH = "gs://bucket/a folder/1"


class Bucket(MemoryFileSystem):
    """gs:// in this process's memory, in the place of gcsfs."""

    protocol = ("gcs", "gs")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
    """bucket(name, content) writes gs://bucket/a folder/NAME."""
    monkeypatch.setattr(backend, "tf_backend", backend.fsspec_backend)
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: Bucket())
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    yield lambda name, content: Bucket().pipe(f"gs://bucket/a folder/{name}", content)
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize("kind", ["files", "lines"])
def test_files_of_a_store_hold_what_local_files_hold(kind, bucket, tmp_path):
    for name, content in {"1": b"one\n\f\ntwo", "2": b"", "3": b"three\r\nfour\n"}.items():
        (tmp_path / name).write_bytes(content)
        bucket(name, content)
    here = text.open_source(f"{kind}:{tmp_path}/*")
    there = text.open_source(f"{kind}:gs://bucket/a folder/*")
    assert there.parts == [f"gs://bucket/a folder/{i}" for i in (1, 2, 3)]
    for one, other in zip(text.texts(here), text.texts(there), strict=True):
        assert (one.content, one.number) == (other.content, other.number)
        assert here.work(one.part) == there.work(other.part)
    assert here.num_bytes() == there.num_bytes() and here.fingerprint() == there.fingerprint()
    (missing,) = set(there.parts) - {there.parts[0], there.parts[1]}
    Bucket().rm(missing)
    with pytest.raises(UserError, match="reading .*: .*bucket/a folder/3"):
        list(there.contents(missing))


def test_documents_equal_their_definition(tmp_path):
    """Documents stand between lines that hold only a form feed, of which several count as one."""
    separator = re.compile(rb"\n\f(?:\r?\n\f)*\r?\n")
    path = tmp_path / "1"
    path.touch()
    source = text.open_source(f"files:{path}")
    for seed in range(500):
        parts = random.Random(seed).choices(["a", "b", "\n", "\n", "\r\n", "\f", "\n\f\n"], k=12)
        content = "".join(parts).encode()
        path.write_bytes(content)
        expected = separator.split(b"\n" + content + b"\n")
        assert list(source.contents(str(path))) == [each.strip(b"\r\n") for each in expected]


def test_a_digest_is_the_same_however_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").write_text("one")
    paths = ("1", "./1", f"{tmp_path}/1")
    assert len({text.open_source(f"files:{path}").fingerprint() for path in paths}) == 1


def test_files_of_a_store_that_are_not_there(bucket, monkeypatch):
    bucket("1", b"one")
    with pytest.raises(UserError, match="no file matches 'gs://bucket/none'"):
        text.open_source("files:gs://bucket/none")
    with pytest.raises(UserError, match="gs://bucket/a folder is a folder, did you mean"):
        text.open_source("files:gs://bucket/a folder")

    def fail(*args, **kwargs):
        raise TimeoutError("the store timed out")

    monkeypatch.setattr(Bucket, "open", fail)
    with pytest.raises(Outage):
        list(text.open_source("files:gs://bucket/a folder/*").contents("gs://bucket/a folder/1"))


def test_a_store_without_its_client_names_the_extra(monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend, "tf_backend", backend.fsspec_backend)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(UserError, match="install gcsfs .*setup.sh seqio"):
        text.open_source("files:gs://bucket/*")


def test_lines_of_a_store_are_fetched_once(bucket, tmp_path):
    """A file of gcsfs would be fetched from each line on, a block at a time."""

    class Fetched(AbstractBufferedFile):
        count = 0

        def _fetch_range(self, start, end):
            Fetched.count += 1
            return content[start:end]

    content = b"".join(b"line %d\n" % number for number in range(20_000))
    bucket("1", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bucket,
            "open",
            lambda self, path, mode: Fetched(
                self, path, mode, 1 << 16, cache_type="readahead", size=len(content)
            ),
        )
        found = list(text.open_source("lines:gs://bucket/a folder/*").contents(PATH))
    assert found == content.splitlines()
    assert Fetched.count <= 4


CHILD = """
from latent_delib.data import text
found = text.open_source("files:gs://bucket/a/*.txt")
print(found.parts, found.num_bytes(), found.fingerprint())
print([each.content for each in text.texts(found)])
"""


@pytest.mark.slow
def test_files_in_cloud_storage_by_tensorflow(tmp_path):
    with fake_gcs.running(tmp_path) as server:
        server.write("bucket/a/1.txt", b"one\n\f\ntwo")
        env = os.environ | server.environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("['gs://bucket/a/1.txt'] 9 ")
    assert done.stdout.splitlines()[1] == "[b'one', b'two']"

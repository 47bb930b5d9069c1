"""gs:// without TensorFlow, as on the workers of a slice: epath and jax's cache, through gcsfs."""

import os
import subprocess
import sys

import pytest

from tests.fake_gcs import running

WITHOUT_TENSORFLOW = "import sys; sys.modules['tensorflow'] = None\n"
FILES = """
import urllib.request
from etils import epath
from latent_delib.machine import files

folder = epath.Path("gs://bucket/some/folder")
files.write(folder / "one.json", b"content")
assert (folder / "one.json").read_bytes() == b"content"
assert [path.name for path in folder.iterdir()] == ["one.json"]

# another process writes beside it, and is seen
url = f"{sys.argv[1]}/upload/storage/v1/b/bucket/o?uploadType=media&name=some/folder/two.json"
urllib.request.urlopen(urllib.request.Request(url, data=b"of another", method="POST"))
assert sorted(path.name for path in folder.iterdir()) == ["one.json", "two.json"]
assert (folder / "two.json").read_bytes() == b"of another"

with (folder / "large").open("wb") as sink:  # in parts
    for letter in (b"a", b"b", b"c"):
        sink.write(8_000_000 * letter)
with (folder / "large").open("rb") as source:
    source.seek(15_999_999)
    assert source.read(2) == b"bc"

(folder / "one.json").unlink()
assert not (folder / "one.json").exists() and not (folder / "nothing").exists()
(folder / "nothing").unlink(missing_ok=True)
folder.rmtree()
assert not folder.is_dir()
print("done")
"""
COMPILED = """
import jax
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
jax.jit(lambda x: x * 3 + 1)(2.0)
print("hits", found.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("gcsfs")
    with running(tmp_path) as server:
        yield server


def output(server, program: str, **more: str) -> str:
    """Returns what a program prints that talks to the server, and has no TensorFlow."""
    environment = os.environ | server.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    address = f"http://127.0.0.1:{server.server_port}"
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW + program, address]
    done = subprocess.run(
        command, env=environment | more, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_read_and_written(server):
    assert output(server, FILES) == "done\n"
    assert not server.objects


def test_the_second_process_finds_what_the_first_compiled(server):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    assert output(server, COMPILED, **cache) == "hits 0\n"
    assert any(name.startswith("bucket/compiled/jit_") for name in server.objects)
    hits = int(output(server, COMPILED, **cache).removeprefix("hits "))
    assert hits == len(server.objects)

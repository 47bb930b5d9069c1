"""Models by their name on the Hub, against a small server that answers as the Hub does."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from latent_delib.convert import convert
from latent_delib.errors import UserError
from latent_delib.weights import folder, hub

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40
REFUSED = {"me/gated": (403, "GatedRepo"), "me/absent": (404, "RepoNotFound")}


class Handler(BaseHTTPRequestHandler):
    """Serves the files of each folder below `server.models` as a model OWNER/NAME."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_about_model = parts[:2] == ["api", "models"]
        model = "/".join(parts[2:4] if is_about_model else parts[:2])
        if model in REFUSED:
            status, code = REFUSED[model]
            self.reply(status, b"{}", {"X-Error-Code": code}, with_body)
        elif is_about_model and parts[5] not in ("main", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif is_about_model:
            files = sorted((self.server.models / model).iterdir())
            siblings = [{"rfilename": path.name} for path in files]
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in files
            ]
            about = {"id": model, "sha": COMMIT, "siblings": siblings}
            body = json.dumps(tree if parts[4] == "tree" else about).encode()
            self.reply(200, body, {}, with_body)
        else:
            self.server.asked.append(parts[-1])
            body = (self.server.models / model / parts[-1]).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self.reply(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(models: Path) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.models = models
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


# In a process of its own: the client reads where the Hub is when it is imported.
CHILD = """
import sys
import latent_delib as ld
for name in sys.argv[1:]:
    try:
        print(ld.load_decoder(name).fingerprint)
    except ld.UserError as error:
        print(error)
"""


def ask(tmp_path: Path, endpoint: str, *names: str, **environment: str) -> list[str]:
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *names], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_models_are_fetched_once_and_stay(tmp_path):
    model = tmp_path / "models" / "me" / "decoder"
    model.mkdir(parents=True)
    for path in folder.PACKAGED.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    convert("packaged", str(tmp_path / "models" / "me" / "theirs"), "huggingface")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    expected = folder.fingerprint(folder.PACKAGED)
    with serving(tmp_path / "models") as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        names = ("hf:me/decoder", "hf:me/decoder@other", "hf:me/gated", "hf:me/absent")
        names += ("hf:me/theirs",)  # in Hugging Face's form
        found = ask(tmp_path, endpoint, *names)
        assert found[0] == expected
        assert found[1] == "hf:me/decoder@other: that model has no revision 'other'"
        assert "accept its terms" in found[2] and "HF_TOKEN" in found[2]
        assert found[3].startswith("hf:me/absent: no such model")
        assert found[4] == expected
        assert "model.safetensors" in server.asked
        assert "pytorch_model.bin" not in server.asked
    found = ask(tmp_path, endpoint, "hf:me/decoder", "hf:me/another", HF_HUB_OFFLINE="1")
    assert found[0] == expected
    assert found[1] == "hf:me/another: not in the Hub's cache, and the Hub does not answer"


@pytest.mark.parametrize("path", ["hf:", "hf:gemma", "hf:a/b/c", "hf:a/b@", "hf://a/b"])
def test_names_of_another_form(path):
    with pytest.raises(UserError, match="expected hf:OWNER/NAME"):
        hub.located(path)


def test_other_paths_stay_as_they_are():
    assert hub.located("runs/a") == Path("runs/a")

"""A small Hugging Face Hub: the folders OWNER/NAME below one, served as models and as datasets."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
REFUSED = {
    "me/gated": (403, "GatedRepo"),
    "me/absent": (404, "RepoNotFound"),
    "me/closed": (403, ""),  # a token that may not read it
    "me/gone": (410, ""),
}
ABOUT = re.compile(r"/api/(?:models|datasets)/(\w+/\w+)(?:/(\w[\w-]*)/(\w+)/?(.*))?")
FILE = re.compile(r"(?:/datasets)?/(\w+/\w+)/resolve/(\w+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does. Its revisions are "main" and COMMIT, which are the same."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.answer(self.rfile.read(length))

    def answer(self, asked: bytes = b"") -> None:
        url = self.path.partition("?")[0]
        about = ABOUT.fullmatch(url)
        file = FILE.fullmatch(url)
        repository = (about or file)[1]
        revision = about[3] if about else file[2]
        if repository in REFUSED:
            self.refuse(*REFUSED[repository])
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif file:
            self.send_file(self.server.folder / repository, file[3])
        else:
            self.send_json(self.about(repository, about[2], asked, below=about[4]))

    def about(self, repository: str, kind: str | None, asked: bytes, below: str) -> object:
        """What the Hub tells of a repository, of some of its paths, or of one of its folders."""
        folder = self.server.folder / repository
        if kind in (None, "revision"):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(folder)) for path in files]
            siblings = [{"rfilename": name} for name in names]
            return {"id": repository, "sha": COMMIT, "siblings": siblings}
        if kind == "paths-info":
            paths = [folder / name for name in json.loads(asked)["paths"]]
        elif "recursive=true" in self.path.lower():
            paths = sorted((folder / below).rglob("*"))
        else:
            paths = sorted((folder / below).iterdir())
        return [self.entry(path, folder) for path in paths if path.exists()]

    def entry(self, path: Path, folder: Path) -> dict[str, object]:
        kind = "file" if path.is_file() else "directory"
        size = path.stat().st_size if path.is_file() else 0
        return {
            "type": kind,
            "path": str(path.relative_to(folder)),
            "size": size,
            "oid": "0" * 40,
        }

    def send_file(self, folder: Path, name: str) -> None:
        self.server.asked.append(name)
        if not (folder / name).is_file():
            self.refuse(404, "EntryNotFound")
            return
        body = (folder / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.reply(200, body, headers)
            return
        first = int(part[1])
        last = min(int(part[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self.reply(206, body[first : last + 1], headers)

    def send_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {})

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Yields a server; `asked` is the list of the files that it was asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder = folder
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def environment(server: ThreadingHTTPServer, cache: Path) -> dict[str, str]:
    """What a process that is to talk to this server needs, before it imports anything."""
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

"""A small Cloud Storage in memory: enough of its JSON API for the clients in use.

The last two are sent here by environment variables. TensorFlow knows one address only, so the
server is also the HTTPS proxy that answers for that address, with a certificate made for it.
"""

import contextlib
import json
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

NAMES = "DNS:www.googleapis.com,DNS:storage.googleapis.com"


class Server(ThreadingHTTPServer):
    """`objects` maps "BUCKET/NAME" to what it holds; there is every bucket.

    may_look_up: whether the account may look up buckets, and not only use their objects.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, dict[str, str]]] = {}
        self.parts: dict[str, bytearray] = {}  # of uploads that go on
        self.lock, self.count = threading.RLock(), 0
        self.may_look_up = True
        key = folder / "key.pem"
        self.certificate = folder / "certificate.pem"
        request = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ]
        request += ["-days", "2", "-subj", "/CN=fake", "-addext", f"subjectAltName={NAMES}"]
        subprocess.run(
            [*request, "-keyout", key, "-out", self.certificate], check=True, capture_output=True
        )
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.certificate, key)

    @property
    def environment(self) -> dict[str, str]:
        """What a process that is to talk to this server needs, before it imports anything."""
        here = f"http://127.0.0.1:{self.server_port}"
        return {
            "HTTPS_PROXY": here,
            "https_proxy": here,
            "CURL_CA_BUNDLE": str(self.certificate),
            "STORAGE_EMULATOR_HOST": here,
            "TENSORSTORE_GCS_HTTP_URL": here,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GCS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which would ask over gRPC
            "NO_GCE_CHECK": "true",
            "GCS_READ_CACHE_BLOCK_SIZE_MB": "1",  # TensorFlow allocates as much for each read
        }

    def handle_error(self, request, client_address):
        """A client that hangs up says nothing."""

    def write(self, path: str, data: bytes) -> int:
        with self.lock:
            self.count += 1
            self.objects[path], self.generations[path] = data, self.count
            return self.count


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Yields a server that runs; skips the test where no certificate can be made."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the server's certificate")
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def answer(self, status: int, body: bytes | dict = b"", **headers: str):
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def serve(self):
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        data = self.body()
        path, host = url.path, self.headers.get("Host", "")
        if found := re.fullmatch(r"/upload/(\d+)", path):
            return self.resume(found[1], data)
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(found[1], query, data)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/storageLayout", path):
            return self.answer(
                200, {"bucket": found[1], "hierarchicalNamespace": {"enabled": False}}
            )
        if found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path):
            bucket, rest = found[1], found[2]
            if rest is not None and (
                both := re.fullmatch(r"(.+)/rewriteTo/b/([^/]+)/o/(.+)", rest)
            ):
                return self.rewrite(f"{bucket}/{unquote(both[1])}", f"{both[2]}/{unquote(both[3])}")
            if rest is not None and (both := re.fullmatch(r"(.+)/moveTo/o/(.+)", rest)):
                return self.move(f"{bucket}/{unquote(both[1])}", f"{bucket}/{unquote(both[2])}")
            if rest is not None:
                return self.one(f"{bucket}/{unquote(rest)}", query)
            if path.endswith("/o"):
                return self.list(bucket, query)
            if not self.server.may_look_up:
                why = "the account does not have storage.buckets.get access to the bucket"
                return self.answer(403, {"error": {"code": 403, "message": why}})
            return self.answer(
                200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"}
            )
        if host.startswith("storage.googleapis.com"):
            return self.read(unquote(path.removeprefix("/")))
        return self.answer(
            404, {"error": {"code": 404, "message": f"fake: {self.command} {self.path}"}}
        )

    do_GET = do_POST = do_PUT = do_DELETE = serve

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def missing(self):
        self.answer(404, {"error": {"code": 404, "message": "No such object"}})

    def about(self, path: str) -> dict:
        bucket, _, name = path.partition("/")
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "id": path,
            "size": str(len(self.server.objects[path])),
            "generation": str(self.server.generations[path]),
            "metageneration": "1",
            "updated": when,
            "timeCreated": when,
            "storageClass": "STANDARD",
        }

    def one(self, path: str, query: dict[str, str]):
        with self.server.lock:
            if path not in self.server.objects:
                return self.missing()
            if self.command == "DELETE":
                if not self.matches(path, query):
                    return self.answer(412)
                del self.server.objects[path]
                return self.answer(204)
            if query.get("alt") != "media":
                return self.answer(200, self.about(path))
        self.read(path)

    def read(self, path: str):
        with self.server.lock:
            data, generation = self.server.objects.get(path), self.server.generations.get(path)
        if data is None:
            return self.missing()
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = found[1], found[2]
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last) + 1 if first and last else len(data), len(data))
            if start >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}", **headers)
            return self.answer(
                206,
                data[start:end],
                Content_Range=f"bytes {start}-{end - 1}/{len(data)}",
                **headers,
            )
        self.answer(200, data, **headers)

    def matches(self, path: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        now = self.server.generations[path] if path in self.server.objects else 0
        return wanted is None or int(wanted) == now

    def put(self, path: str, query: dict[str, str], data: bytes):
        with self.server.lock:
            if not self.matches(path, query):
                return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            self.server.write(path, data)
            self.answer(200, self.about(path))

    def upload(self, bucket: str, query: dict[str, str], data: bytes):
        if query["uploadType"] == "media":
            return self.put(f"{bucket}/{query['name']}", query, data)
        with self.server.lock:
            self.server.count += 1
            number = str(self.server.count)
            self.server.uploads[number] = (f"{bucket}/{query['name']}", query)
        scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
        self.answer(200, Location=f"{scheme}://{self.headers['Host']}/upload/{number}")

    def resume(self, number: str, data: bytes):
        path, query = self.server.uploads[number]
        sent = self.headers.get("Content-Range", "")
        if sent.startswith("bytes */") and path in self.server.objects:
            return self.answer(200, self.about(path))  # only asks how much has arrived
        parts = self.server.parts.setdefault(number, bytearray())
        parts += data
        if sent.endswith("/*"):  # more will come
            return self.answer(308, Range=f"bytes=0-{len(parts) - 1}")
        self.put(path, query, bytes(parts))

    def rewrite(self, source: str, target: str):
        with self.server.lock:
            if source not in self.server.objects:
                return self.missing()
            self.server.write(target, self.server.objects[source])
            size = str(len(self.server.objects[target]))
            about = {
                "done": True,
                "objectSize": size,
                "totalBytesRewritten": size,
                "resource": self.about(target),
            }
            self.answer(200, {"kind": "storage#rewriteResponse"} | about)

    def move(self, source: str, target: str):
        with self.server.lock:
            if source not in self.server.objects:
                return self.missing()
            self.server.write(target, self.server.objects.pop(source))
            self.answer(200, self.about(target))

    def list(self, bucket: str, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        with self.server.lock:
            for path in sorted(self.server.objects):
                name = path.removeprefix(bucket + "/")
                if (
                    name == path
                    or not name.startswith(prefix)
                    or name < first
                    or (last and name >= last)
                ):
                    continue
                head, found, _ = (
                    name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                )
                if found and not (
                    query.get("includeTrailingDelimiter") == "true" and name.endswith(delimiter)
                ):
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(self.about(path))
        limit = int(query.get("maxResults", 1000))
        self.answer(
            200,
            {
                "kind": "storage#objects",
                "items": items[:limit],
                "prefixes": sorted(prefixes)[:limit],
            },
        )

"""A bucket of S3 on loopback, in memory, in as few calls as an upload makes; it refuses what it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


def _document(name: str, content: str) -> str:
    return f'<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{content}</{name}>'


class Refusal(NamedTuple):
    """What the next request of a kind is answered with; `more` is of the error's document."""

    status: int
    code: str
    more: str = ""


class Bucket(ThreadingHTTPServer):
    """The bucket `models`. `done` has what was asked, as METHOD KEY; `refusals` are by METHOD."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.knows_conditions = True
        self.refusals: dict[str, list[Refusal]] = {}
        self.done: list[str] = []
        self.conditions: list[str] = []
        self.lock = threading.Lock()
        # Before each answer; a test looks at what is there.
        self.holds: dict[str, threading.Event] = {}
        self.held = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, *_: Any, **__: Any) -> None:
        """Nothing: `done` says it."""

    def _any(self) -> None:
        bucket = self.server
        found = urlsplit(self.path)
        asked = parse_qs(found.query, keep_blank_values=True)
        name, _, key = unquote(found.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with bucket.lock:
            bucket.done.append(f"{self.command} {key}")
            waiting = bucket.refusals.get(self.command, [])
            refusal = waiting.pop(0) if waiting else None
        if hold := bucket.holds.get(f"{self.command} {key}"):
            bucket.held.set()
            hold.wait(60)
        if refusal:
            self._refuse(refusal)
        elif name != "models":
            self._refuse(Refusal(404, "NoSuchBucket"))
        elif self.command == "GET":
            self._list(asked["prefix"][0])
        elif self.command == "DELETE":
            if "uploadId" in asked:
                bucket.parts.pop(key, None)
            else:
                bucket.objects.pop(key, None)
            self._answer(204)
        else:
            self._write(key, asked, body)

    def _write(self, key: str, asked: dict[str, list[str]], body: bytes) -> None:
        bucket = self.server
        if "uploads" in asked:
            bucket.parts[key] = {}
            self._answer(200, _document("InitiateMultipartUploadResult", "<UploadId>1</UploadId>"))
        elif "partNumber" in asked:
            bucket.parts[key][int(asked["partNumber"][0])] = body
            self._answer(200, etag=hashlib.md5(body).hexdigest())
        elif (condition := self.headers["If-None-Match"]) and self._is_refused(key, condition):
            self._refuse(Refusal(412, "PreconditionFailed"))
        elif "uploadId" in asked:
            parts = bucket.parts.pop(key)
            bucket.objects[key] = b"".join(parts[number] for number in sorted(parts))
            self._answer(200, _document("CompleteMultipartUploadResult", "<ETag>1</ETag>"))
        else:
            bucket.objects[key] = body
            self._answer(200, etag=hashlib.md5(body).hexdigest())

    do_GET = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

    def _is_refused(self, key: str, condition: str) -> bool:
        self.server.conditions.append(f"{key} {condition}")
        return self.server.knows_conditions and key in self.server.objects

    def _list(self, prefix: str) -> None:
        keys = sorted(key for key in self.server.objects if key.startswith(prefix))
        found = "".join(f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>" for key in keys)
        self._answer(200, _document("ListBucketResult", f"<IsTruncated>false</IsTruncated>{found}"))

    def _refuse(self, refusal: Refusal) -> None:
        self._answer(refusal.status, f"<Error><Code>{refusal.code}</Code>{refusal.more}</Error>")

    def _answer(self, status: int, document: str = "", etag: str = "") -> None:
        body = document.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket that answers until the end."""
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield bucket
        finally:
            for hold in bucket.holds.values():
                hold.set()
            bucket.shutdown()
            thread.join()

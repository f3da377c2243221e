"""A hub of models on loopback: the few answers of it that sizing asks for, each request counted."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^/]+)")
_PIECE = 64 * 1024


class Hub(ThreadingHTTPServer):
    """Serves `folders` by ORG/NAME. `asked` has each request, `sent` the bytes of all bodies.

    Once a request has `arrived`, it waits until it may `go_on`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.ranges = True
        self.status = 0
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.sent = 0
        self.lock = threading.Lock()
        self.arrived = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any, **__: Any) -> None:
        """Nothing: `asked` says it."""

    def do_GET(self) -> None:
        hub = self.server
        with hub.lock:
            hub.asked.append(self.path)
            hub.tokens.add(self.headers["Authorization"])
        hub.arrived.set()
        hub.go_on.wait(60)
        found = _RESOLVE.fullmatch(self.path.removeprefix("/cdn"))
        folder = hub.folders.get(found["name"]) if found else None
        if hub.status:
            self._refuse(hub.status, "")
        elif not found or folder is None:
            self._refuse(401, "RepoNotFound")
        elif found["name"] in hub.gated and not self.headers["Authorization"]:
            self._refuse(401, "GatedRepo")
        elif found["revision"] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif not (folder / found["file"]).is_file():
            self._refuse(404, "EntryNotFound")
        elif found["file"].endswith(".safetensors") and not self.path.startswith("/cdn"):
            # What is large is elsewhere.
            self.send_response(302)
            self.send_header("Location", f"{hub.url}/cdn{self.path}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(folder / found["file"])

    def _send(self, file: Path) -> None:
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=0-(\d+)", self.headers["Range"] or "") if self.server.ranges else None
        length = min(size, int(asked[1]) + 1) if asked else size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes 0-{length - 1}/{size}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with file.open("rb") as opened, contextlib.suppress(ConnectionError):
            while length:
                piece = opened.read(min(_PIECE, length))
                self.wfile.write(piece)
                length -= len(piece)
                with self.server.lock:
                    self.server.sent += len(piece)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

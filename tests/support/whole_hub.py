"""A hub of models on loopback for huggingface_hub: listings, files by ranges, and every fault that is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>.+)")
_TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_PIECE = 64 * 1024
# A file of weights is kept by its SHA-256, any other one by Git's own hash.
_LARGE = (".safetensors", ".bin", ".gguf", ".pth")


class Refusal(NamedTuple):
    """An answer in place of the one asked for."""

    status: int
    code: str = ""
    retry_after: str = ""


class WholeHub(ThreadingHTTPServer):
    """Serves `models`, each file as its bytes. What is asked of it and how much it sends is counted.

    `refusals` are the answers to the next requests for a path; `cuts` the bytes after which the next answers with a
    file break off; `holds` the bytes after which they wait until they may `go_on`; `wrong` the place of a byte that
    is sent wrong, each time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.gated: set[str] = set()
        self.branches = {"main"}
        self.ranges = True
        self.refusals: dict[str, list[Refusal]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.holds: dict[str, int] = {}
        self.wrong: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.sent = 0
        self.lock = threading.Lock()
        self.held = threading.Event()
        self.go_on = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what is tested."""

    def commit(self, name: str) -> str:
        """The commit of a model, which is another one for other files."""
        listed = sorted((path, oid(path, data)) for path, data in self.models[name].items())
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()

    def files_asked(self) -> list[tuple[str, str | None]]:
        """The files that were asked for, and from where on."""
        return [(found["path"], part) for path, part in self.asked if (found := _FILE.fullmatch(path))]


def oid(path: str, data: bytes) -> str:
    """The hash by which a hub knows a file."""
    if path.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WholeHub

    def log_message(self, *_: Any, **__: Any) -> None:
        """Nothing: `asked` says it."""

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.asked.append((path, self.headers["Range"]))
            hub.tokens.add(self.headers["Authorization"])
            refusals = hub.refusals.get(path, [])
            refusal = refusals.pop(0) if refusals else None
        if refusal:
            self._refuse(refusal)
        elif found := _INFO.fullmatch(path):
            if self._may_be_seen(found["name"], found["revision"]):
                self._json({"id": found["name"], "sha": hub.commit(found["name"]), "siblings": []})
        elif found := _TREE.fullmatch(path):
            if self._may_be_seen(found["name"], found["revision"]):
                self._json([self._listed(*one) for one in hub.models[found["name"]].items()])
        elif found := _FILE.fullmatch(path):
            if self._may_be_seen(found["name"], found["revision"]):
                self._file(found["path"], hub.models[found["name"]].get(found["path"]))
        else:
            self._refuse(Refusal(404))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _may_be_seen(self, name: str, revision: str) -> bool:
        hub = self.server
        if name not in hub.models:
            self._refuse(Refusal(401, "RepoNotFound"))
        elif name in hub.gated and self.headers["Authorization"] != "Bearer hf_may":
            self._refuse(Refusal(403 if self.headers["Authorization"] else 401, "GatedRepo"))
        elif revision not in hub.branches | {hub.commit(name)}:
            self._refuse(Refusal(404, "RevisionNotFound"))
        else:
            return True
        return False

    def _listed(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.server.sizes.get(path, len(data))
        found = {"type": "file", "path": path, "size": size, "oid": oid(path, data)}
        if path.endswith(_LARGE):
            found |= {"oid": "0" * 40, "lfs": {"oid": oid(path, data), "size": size, "pointerSize": 130}}
        return found

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, path: str, data: bytes | None) -> None:
        hub = self.server
        if data is None:
            self._refuse(Refusal(404, "EntryNotFound"))
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if hub.ranges else None
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{oid(path, data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command != "GET":
            return
        cuts = hub.cuts.get(path, [])
        end = min(len(data), start + cuts.pop(0)) if cuts else len(data)
        hold = hub.holds.get(path, len(data))
        wrong = hub.wrong.get(path)
        with contextlib.suppress(ConnectionError):
            while start < end:
                if start >= hold:
                    hub.held.set()
                    hub.go_on.wait(60)
                    hold = len(data)
                piece = bytearray(data[start : min(end, hold, start + _PIECE) if start < hold else end])
                if wrong is not None and start <= wrong < start + len(piece):
                    piece[wrong - start] ^= 1
                self.wfile.write(piece)
                start += len(piece)
                with hub.lock:
                    hub.sent += len(piece)
        if end < len(data):
            self.close_connection = True

    def _refuse(self, refusal: Refusal) -> None:
        self.send_response(refusal.status)
        if refusal.code:
            self.send_header("X-Error-Code", refusal.code)
        if refusal.retry_after:
            self.send_header("Retry-After", refusal.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving() -> Iterator[WholeHub]:
    """A hub that answers until the end."""
    with WholeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.go_on.set()
            hub.shutdown()
            thread.join()

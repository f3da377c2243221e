"""How long `vllm-gateway download` takes beside curl and sha256sum: `python -m bench.downloading`, on a quiet machine.

One file from a hub on loopback that sends it by sendfile, into an empty folder, in turns; each time is a whole process,
or both of them. The median of the other's time over ours is what the two are compared by.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_NAME = "model.safetensors"
_PIECE = 1024 * 1024


class _Hub(BaseHTTPRequestHandler):
    """A model of one file."""

    protocol_version = "HTTP/1.1"
    file: Path
    oid: str

    def log_message(self, *_: Any, **__: Any) -> None:
        """Nothing: a line costs time."""

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._head(self.file.stat().st_size)
            with self.file.open("rb") as file:
                self.connection.sendfile(file)
        elif "/tree/" in self.path:
            size = self.file.stat().st_size
            self._json([{"type": "file", "path": _NAME, "size": size, "oid": "0" * 40, "lfs": self._lfs(size)}])
        else:
            self._json({"id": "org/model", "sha": _COMMIT, "siblings": []})

    def _lfs(self, size: int) -> dict[str, object]:
        return {"oid": self.oid, "size": size, "pointerSize": 130}

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(len(body))
        self.wfile.write(body)

    def _head(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _make(file: Path, megabytes: int) -> str:
    found = hashlib.sha256()
    with file.open("wb") as out:
        for _ in range(megabytes):
            piece = os.urandom(1_000_000)
            out.write(piece)
            found.update(piece)
    return found.hexdigest()


def _by_curl(url: str, folder: Path) -> None:
    target = folder / _NAME
    url = f"{url}/org/model/resolve/{_COMMIT}/{_NAME}"
    subprocess.run(["curl", "-sSf", "-o", target, url], check=True)
    subprocess.run(["sha256sum", target], check=True, stdout=subprocess.DEVNULL)


def _by_ours(url: str, folder: Path) -> None:
    command = [sys.executable, "-m", "gateway", "download", "org/model", "--local-dir", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "HF_ENDPOINT": url}, capture_output=True)


@click.command()
@click.option("--megabytes", default=1000, show_default=True)
@click.option("--turns", default=5, show_default=True)
def main(megabytes: int, turns: int) -> None:
    """Fetch a file from loopback with both, in turns."""
    with tempfile.TemporaryDirectory() as name:
        _Hub.file = Path(name) / "source"
        _Hub.oid = _make(_Hub.file, megabytes)
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        ratios = []
        for turn in range(turns):
            seconds = []
            for fetch in (_by_curl, _by_ours):
                folder = Path(name) / "target"
                folder.mkdir()
                began = time.monotonic()
                fetch(url, folder)
                seconds.append(time.monotonic() - began)
                shutil.rmtree(folder)
            ratios.append(seconds[0] / seconds[1])
            click.echo(f"{turn + 1}: curl and sha256sum {seconds[0]:.2f} s, download {seconds[1]:.2f} s")
        click.echo(f"{megabytes} MB: download is at {statistics.median(ratios):.0%} of their speed (median)")
        server.shutdown()


if __name__ == "__main__":
    main()

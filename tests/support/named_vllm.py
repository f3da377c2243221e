"""A scripted vLLM as a process, for what has to be killed: `python -m tests.support.named_vllm PORT`.

Each of its answers, a stream of a fifth of a second, says its port, so that who asks learns where a call went.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tests.support.fake_vllm import DONE, STREAM_END, STREAM_HEAD, FakeVllm, Received, Step, chunk, event
from tests.support.ports import free_port


class NamedVllm(FakeVllm):
    """The server."""

    def answer_to(self, request: Received) -> Sequence[Step]:
        """Its port, and a little more."""
        events = (event({"role": "assistant", "content": str(self.port)}), event({"content": "."}, "stop"), DONE)
        first, *others = map(chunk, events)
        return [STREAM_HEAD, first, *(step for one in others for step in (0.1, one)), STREAM_END]


class NamedProcess:
    """Starts it, and kills it; on the same port each time."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """It listens when this returns."""
        self._process = subprocess.Popen([sys.executable, "-m", "tests.support.named_vllm", str(self.port)])
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert time.monotonic() < until, "the scripted vLLM does not listen"
            time.sleep(0.02)

    def kill(self) -> None:
        """By SIGKILL; when this returns nothing of it is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    with NamedVllm(int(sys.argv[1])):
        threading.Event().wait()

"""A wire with an ear: forwards connections and keeps what the server answered."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from dataclasses import dataclass, field

import httptools


@dataclass
class Answer:
    """One response as the server sent it, its framing taken off."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class Tee:
    """Listens in front of a server on the loopback address. Use as a context manager."""

    def __init__(self, port: int) -> None:
        self.answers: list[Answer] = []

        tee = self

        class Forward(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", port)) as server:
                    tee._forward(self.request, server)

        self._listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        ear = _Ear(self.answers)
        while True:
            readable, _, _ = select.select([client, server], [], [])
            for source in readable:
                data = source.recv(65536)
                if not data:
                    return
                if source is server:
                    ear.feed(data)  # first: who gets it may look at once for what was heard
                (server if source is client else client).sendall(data)

    def __enter__(self) -> Tee:
        self._thread = threading.Thread(target=self._listener.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()


class _Ear:
    """httptools' callbacks: every response of one connection."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data

    def on_message_begin(self) -> None:
        self._answer = Answer()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers.append((name.decode().lower(), value.decode()))

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._answer.body += data

    def on_message_complete(self) -> None:
        self._answers.append(self._answer)

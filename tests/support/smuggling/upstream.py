"""A model server that answers with what it was asked, and takes nothing but what the gateway may send."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import cast

import orjson

from gateway.wire.routes import ROUTES
from tests.support.fake_vllm import probe_answers, response

# What a relayed request looks like, byte by byte; written without the gateway's own lists of headers.
_LINE = re.compile(rb"(GET|POST) (/[\x21-\x7e\x80-\xff]*) HTTP/1\.1")
_HEADER = re.compile(rb"([a-z0-9!#$%&'*+.^_`|~-]+): ([\t\x20-\x7e\x80-\xff]*)")
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_NEVER = {
    *(b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"http2-settings", b"expect"),
    *(b"proxy-connection", b"proxy-authorization", b"proxy-authenticate", b"cookie", b"api-key", b"x-api-key"),
    b"authorization",
}
_PATHS = re.compile(
    "|".join(re.escape(route.path).replace(r"\{response_id\}", r"resp_[A-Za-z0-9_-]+") for route in ROUTES).encode()
)
# Of a head without the parts that are the gateway's own.
_OURS = (b"host", b"x-request-id", b"content-length", b"transfer-encoding")

Header = tuple[bytes, bytes]


class Got:
    """One relayed request."""

    def __init__(self, line: bytes, headers: list[Header]) -> None:
        self.line = line
        self.headers = headers
        self.body = b""

    @property
    def asked(self) -> bytes:
        """Method, target and body, as cases.txt has them."""
        return b" ".join([self.line.removesuffix(b" HTTP/1.1"), self.body]).rstrip(b" ")

    @property
    def sent(self) -> tuple[bytes, list[Header], bytes]:
        """All of it, but for what differs from one gateway to the next."""
        kept = [header for header in self.headers if header[0] not in _OURS]
        return self.line, kept, self.body

    @property
    def request_id(self) -> bytes:
        """Its id."""
        return dict(self.headers).get(b"x-request-id", b"")


class Upstream:
    """On a loop that runs. `got` are the relayed requests, `faults` whatever in their bytes should not have been."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.faults: list[str] = []
        self.connections = 0
        self.open: set[_Connection] = set()
        self.authority = b""
        self.probes = {name.encode(): answer for name, answer in probe_answers().items()}

    async def start(self) -> str:
        """Its URL."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=512)
        self.authority = b"127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]
        return f"http://{self.authority.decode()}"

    def stop(self) -> None:
        """Close everything."""
        self._server.close()
        for connection in list(self.open):
            connection.transport.abort()

    def fault(self, what: str, data: bytes) -> None:
        """Something came that should not have."""
        self.faults.append(f"{what}: {data[:300]!r}")

    def answer(self, got: Got) -> bytes:
        """What it is told: all that it asked."""
        self.got.append(got)
        return response("200 OK", orjson.dumps({"asked": got.asked.decode("latin-1")}))

    def check(self, got: Got) -> None:
        """That this is as the gateway may send it."""
        line = _LINE.fullmatch(got.line)
        if line is None:
            self.fault("no request line", got.line)
        elif _PATHS.fullmatch(line[2].partition(b"?")[0]) is None:
            self.fault("a path that is none", got.line)
        count = Counter(name for name, _ in got.headers)
        whole = repr((got.line, got.headers)).encode()
        if [value for name, value in got.headers if name == b"host"] != [self.authority]:
            self.fault("not one host, of this server's", whole)
        if line is not None and count[b"content-length"] + count[b"transfer-encoding"] != (line[1] == b"POST"):
            self.fault("not one framing", whole)
        if count[b"x-request-id"] != 1 or not _ID.fullmatch(got.request_id):
            self.fault("not one request id", whole)
        if never := _NEVER & count.keys():
            self.fault(f"headers of one hop, or secrets ({never})", whole)


class _Connection(asyncio.Protocol):
    def __init__(self, server: Upstream) -> None:
        self._server = server
        self._buffer = b""
        self._got: Got | None = None
        self._left: int | None = 0  # None: in chunks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.connections += 1
        self._server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._got is None and not self._head():
            return
        got = self._got
        assert got is not None
        if not (self._in_chunks(got) if self._left is None else self._of_length(got)):
            return
        self._got = None
        if self._buffer:
            self._server.fault("bytes behind a request", self._buffer)
        self.transport.write(self._server.answer(got))

    def _head(self) -> bool:
        """Whether a relayed request's head is there."""
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return False
        line, *lines = head.split(b"\r\n")
        headers: list[Header] = []
        for one in lines:
            if header := _HEADER.fullmatch(one):
                headers.append((header[1], header[2]))
            elif b"user-agent: python-httpx" not in head.lower():
                self._server.fault("no header", one)
        target = line.split(b" ")[1] if line.count(b" ") == 2 else b""
        if b"\r\nuser-agent: python-httpx" in head.lower() and not any(n == b"x-request-id" for n, _ in headers):
            self._probe(target, lines, rest)
            return False
        self._buffer = rest
        self._got = Got(line, headers)
        self._server.check(self._got)
        length = dict(headers).get(b"content-length")
        coding = dict(headers).get(b"transfer-encoding")
        if coding not in (None, b"chunked"):
            self._server.fault("an unknown coding", coding or b"")
        if length is not None and (not length.isdigit() or length != b"%d" % int(length)):
            self._server.fault("no length", length)
            length = b"0"
        self._left = None if coding else int(length or 0)
        return True

    def _probe(self, target: bytes, lines: list[bytes], rest: bytes) -> None:
        length = next((int(line[16:]) for line in lines if line.lower().startswith(b"content-length: ")), 0)
        if len(rest) >= length:
            self._buffer = rest[length:]
            self.transport.write(self._server.probes.get(target, response("404 Not Found", b"{}")))

    def _of_length(self, got: Got) -> bool:
        assert self._left is not None
        if len(self._buffer) < self._left:
            return False
        got.body, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        return True

    def _in_chunks(self, got: Got) -> bool:
        while True:
            size, end, rest = self._buffer.partition(b"\r\n")
            if not end:
                return False
            if not re.fullmatch(rb"[0-9a-f]+", size):
                self._server.fault("no chunk", size)
                self.transport.abort()
                return False
            length = int(size, 16)
            if len(rest) < length + 2:
                return False
            if rest[length : length + 2] != b"\r\n":
                self._server.fault("no end of a chunk", rest[length : length + 2])
            got.body += rest[:length]
            self._buffer = rest[length + 2 :]
            if not length:
                return True

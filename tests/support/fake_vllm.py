"""A scripted vLLM on a real socket, for what the real one cannot be made to show.

Its bytes are shaped as vLLM 0.32 sends them. Each relayed request takes the next script that a test
has queued, or the default one; a script is a list of steps: bytes to write, a `Hold` to wait at,
seconds to wait, or `RESET` or `CLOSE` to end the connection. Probes (/health, /v1/models, /tokenize, /metrics) are
answered by `probe_answers`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import orjson

RESET: Literal["reset"] = "reset"
CLOSE: Literal["close"] = "close"
MODEL = "demo"


class Hold:
    """A place where a script waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._release: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._released = False

    async def wait(self) -> None:
        """Called by the server."""
        self._loop, self._release = asyncio.get_running_loop(), asyncio.Event()
        self.reached.set()
        if not self._released:
            await self._release.wait()

    def release(self) -> None:
        """Called by the test."""
        self._released = True
        if self._loop is not None and self._release is not None:
            self._loop.call_soon_threadsafe(self._release.set)


Step = bytes | Hold | float | Literal["reset", "close"]


@dataclass
class Received:
    """One request, as it came; `closed` is set when its connection closes before its answer's end."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int
    closed: threading.Event = field(default_factory=threading.Event)

    def header(self, name: str) -> str | None:
        """A header's value, None where it is absent."""
        return next((value for header, value in self.headers if header == name), None)


def response(status: str, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    """A whole response."""
    lines = [f"HTTP/1.1 {status}", "date: Fri, 20 Nov 2026 23:03:18 GMT", "server: uvicorn", *headers]
    lines += [f"content-length: {len(body)}", f"content-type: {kind}", "x-request-id: upstreams-own"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Fri, 20 Nov 2026 23:03:18 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\nx-request-id: upstreams-own\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(delta: dict[str, object] | None, finish: str | None = None, **more: object) -> bytes:
    """A chat chunk as an event; None for one without choices."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    fields = {"id": "chatcmpl-9aa45bfc53c2780e", "object": "chat.completion.chunk", "created": 1795215799}
    choices = [] if delta is None else [choice]
    return b"data: " + orjson.dumps({**fields, "model": MODEL, "choices": choices, **more}) + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 31, "total_tokens": 35, "completion_tokens": 4}
EVENTS = [
    event({"role": "assistant", "content": ""}),
    event({"content": "It's"}),
    event({"content": ' a "q"\n'}),
    event({"content": " end"}, "length"),
    event(None, usage=USAGE),
    DONE,
]


# What a client gets of these that did not ask to be told of tokens, where the gateway did.
UNTOLD = [*EVENTS[:-2], DONE]


def stream(events: list[bytes]) -> list[Step]:
    """A stream of these events, each a chunk of its own."""
    return [STREAM_HEAD, *map(chunk, events), STREAM_END]


def completion(text: str | None = "It's.", finish: str = "stop", **message: object) -> bytes:
    """A whole chat completion's body."""
    said = {"role": "assistant", "content": text, "reasoning": None, **message}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    fields = {"id": "chatcmpl-81c4fff0c7f00d30", "object": "chat.completion", "created": 1795215798, "model": MODEL}
    return orjson.dumps({**fields, "choices": [choice], "usage": USAGE})


METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:generation_tokens_total{engine="0",model_name="demo"} 202.0
vllm:generation_tokens_created{engine="0",model_name="demo"} 1.795215799e+09
"""


# Paths that are posted to, as the server of a model that chats has them, and as it has not.
OF_A_CHAT_MODEL = ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions")
NOT_OF_A_CHAT_MODEL = (
    *("/v1/audio/transcriptions", "/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"),
    *("/pooling", "/classify"),
)


def probe_answers(models: tuple[str, ...] = (MODEL,)) -> dict[str, bytes]:
    """What a server that serves these is asked by probes, and says."""
    listed = [{"id": model, "object": "model", "owned_by": "vllm", "max_model_len": 1024} for model in models]
    return {
        "/health": response("200 OK", b""),
        "/v1/models": response("200 OK", orjson.dumps({"object": "list", "data": listed})),
        **dict.fromkeys(NOT_OF_A_CHAT_MODEL, response("404 Not Found", b'{"detail":"Not Found"}')),
        **dict.fromkeys(OF_A_CHAT_MODEL, response("405 Method Not Allowed", b'{"detail":"Method Not Allowed"}')),
        "/metrics": response("200 OK", METRICS, kind="text/plain; version=0.0.4; charset=utf-8"),
        "/tokenize": response("200 OK", b'{"count":1,"max_model_len":1024,"tokens":[90],"token_strs":null}'),
    }


class FakeVllm:
    """The server, in a thread and loop of its own. Use as a context manager."""

    def __init__(
        self,
        port: int = 0,
        models: tuple[str, ...] = (MODEL,),
        certificate: Path | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """`certificate` is a file with a key and a certificate, for TLS."""
        self.host = host
        self.port = port
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self.received: list[Received] = []
        self.connections = 0
        self.probe_answers = probe_answers(models)
        self.probed: deque[Received] = deque(maxlen=1000)
        self.changed = threading.Condition()
        self.open: set[_Connection] = set()
        self._scripts: deque[Sequence[Step]] = deque()
        self._loop = asyncio.new_event_loop()

    def queue(self, *scripts: Sequence[Step]) -> None:
        """Scripts for the next relayed requests, in turn."""
        self._scripts.extend(scripts)

    def close_after_probes(self) -> None:
        """So that no probe's connection is there for a call: each has a new one."""
        closing = b"\r\nconnection: close\r\n\r\n"
        answers = self.probe_answers.items()
        self.probe_answers = {path: answer.replace(b"\r\n\r\n", closing, 1) for path, answer in answers}

    def clear(self) -> None:
        """From now on there are no scripts."""
        self._scripts.clear()

    def wait(self, ready: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until something that this server sees has come about."""
        with self.changed:
            assert self.changed.wait_for(ready, seconds), "the fake vLLM never saw it"

    def wait_for_request(self, number: int = 1) -> Received:
        """The relayed request of this number, counted from 1."""
        self.wait(lambda: len(self.received) >= number)
        return self.received[number - 1]

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(lambda: _Connection(self), self.host, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        # A connection that is accepted just now has a task, too, which must come to its end: or its socket stays open.
        scripts = {connection.script for connection in self.open}
        await self._ended(asyncio.all_tasks() - scripts)
        for connection in list(self.open):
            connection.transport.abort()
        while self.open:  # noqa: ASYNC110 - asyncio tells of an abort in the loop's next turns, by a callback alone
            await asyncio.sleep(0)
        await self._ended(asyncio.all_tasks())

    async def _ended(self, tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.gather(*(tasks - {asyncio.current_task()}), return_exceptions=True)

    def script_for(self, request: Received) -> Sequence[Step]:
        """What to answer; a request without an id is a probe, as all that is relayed has one."""
        probes = request.method == "GET" or request.target == "/tokenize"
        if probes and request.header("x-request-id") is None and request.target in self.probe_answers:
            with self.changed:
                self.probed.append(request)
                self.changed.notify_all()
            return [self.probe_answers[request.target]]
        with self.changed:
            self.received.append(request)
            self.changed.notify_all()
        if self._scripts:
            return self._scripts.popleft()
        if request.target == "/v1/models":
            return [self.probe_answers["/v1/models"]]
        return self.answer_to(request)

    def answer_to(self, request: Received) -> Sequence[Step]:
        """What to answer where no script is queued."""
        streamed = b'"stream":true' in request.body.replace(b" ", b"")
        return stream(EVENTS) if streamed else [response("200 OK", completion(), "vary: Origin")]


class _Connection(asyncio.Protocol):
    """One connection to the fake: a request at a time."""

    def __init__(self, server: FakeVllm) -> None:
        self._server = server
        self._buffer = b""
        self._request: Received | None = None
        self.script: asyncio.Task[None] | None = None  # as it is played
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections += 1
        self._number = self._server.connections
        self._server.open.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
        length = next((int(value) for name, value in headers if name == "content-length"), 0)
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._request = Received(method, target, headers, rest[:length], self._number)
        script = self._server.script_for(self._request)
        self.script = asyncio.get_running_loop().create_task(self._play(script))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self)
        self._writable.set()
        with self._server.changed:
            if self._request is not None and self.script is not None and not self.script.done():
                self.script.cancel()
                self._request.closed.set()
            self._server.changed.notify_all()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def _play(self, script: Sequence[Step]) -> None:
        for step in script:
            if isinstance(step, Hold):
                await step.wait()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif step == "close":
                self.transport.close()
                return
            elif step == "reset":
                linger = struct.pack("ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()
                return
            else:
                self.transport.write(step)
                await self._writable.wait()

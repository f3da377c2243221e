"""A fast upstream that behaves as vLLM on the wire, checks what it is sent and counts what it sees.

How a stream goes stands before the user's text, as that survives every peer: `events:interval ms:delay ms`, and for
one that speaks in turns with those of other gateways `:first turn ms:cycle ms`, by the monotonic clock.
The text of each event is the monotonic clock, in nanoseconds, at the time of its writing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import httptools
import orjson
import uvloop

MODEL = "demo"
# How long the streams of one gateway speak until it is the next one's turn, in seconds.
TURN = 0.2
_FIELDS = b'"id":"chatcmpl-9aa45bfc53c2780e","object":"chat.completion.chunk","created":1795215799,"model":"demo"'
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Fri, 20 Nov 2026 23:03:18 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_COMPLETION = orjson.dumps(
    {
        "id": "chatcmpl-81c4fff0c7f00d30",
        "object": "chat.completion",
        "created": 1795215798,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A branch of machine learning.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {"prompt_tokens": 31, "total_tokens": 53, "completion_tokens": 22, "prompt_tokens_details": None},
    }
)


def _whole(status: bytes, body: bytes) -> bytes:
    return (
        b"HTTP/1.1 %b\r\ndate: Fri, 20 Nov 2026 23:03:18 GMT\r\nserver: uvicorn\r\n"
        b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (status, len(body), body)
    )


def _event(choices: bytes, more: bytes = b"") -> bytes:
    data = b'data: {%b,"choices":[%b]%b}\n\n' % (_FIELDS, choices, more)
    return b"%x\r\n%b\r\n" % (len(data), data)


_ROLE = _event(b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}')
_LAST = _event(b'{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}')
_USAGE = _event(b"", b',"usage":{"prompt_tokens":31,"total_tokens":53,"completion_tokens":22}')
_END = _LAST + _USAGE + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_ANSWER = _whole(b"200 OK", _COMPLETION)
_FIXED = {
    b"/health": _whole(b"200 OK", b""),
    b"/v1/models": _whole(
        b"200 OK", b'{"object":"list","data":[{"id":"demo","object":"model","max_model_len":40960}]}'
    ),
    b"/tokenize": _whole(b"200 OK", b'{"count":1,"max_model_len":40960,"tokens":[90],"token_strs":null}'),
}


class Counts:
    """What the mock has seen; `aborts` are times of closed connections whose answer was not done, until asked for."""

    def __init__(self) -> None:
        self.requests = 0
        self.refused = 0
        self.aborts: list[int] = []


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._left = 0
        self._interval = 0.0
        self._turn = self._cycle = 0.0
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._counts.aborts.append(time.monotonic_ns())

    def on_message_begin(self) -> None:
        self._url = b""
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if (fixed := _FIXED.get(self._url)) is not None:
            self._transport.write(fixed)
        elif self._url == b"/bench/counts":
            counts = {"requests": self._counts.requests, "refused": self._counts.refused}
            self._transport.write(_whole(b"200 OK", orjson.dumps(counts)))
        elif self._url == b"/bench/aborts":
            aborts, self._counts.aborts = self._counts.aborts, []
            self._transport.write(_whole(b"200 OK", orjson.dumps(aborts)))
        else:
            self._answer(b"".join(self._body))

    def _answer(self, body: bytes) -> None:
        self._counts.requests += 1
        try:
            call = orjson.loads(body)
            assert call["model"] == MODEL
            plan = call["messages"][-1]["content"].partition(" ")[0]
            if call.get("stream"):
                events, interval, delay, *turns = map(int, plan.split(":"))
        except (AssertionError, LookupError, TypeError, ValueError):
            self._counts.refused += 1
            self._transport.write(_whole(b"400 Bad Request", b'{"error":{"message":"not the call that was made"}}'))
            return
        if not call.get("stream"):
            self._transport.write(_ANSWER)
            return
        self._left = events
        self._interval = interval / 1000
        self._turn, self._cycle = (one / 1000 for one in turns or (0, 0))
        self._timer = self._loop.call_later(delay / 1000, self._begin)

    def _begin(self) -> None:
        self._transport.write(_STREAM_HEAD + _ROLE)
        self._due = self._loop.time()
        if self._turn:
            # Not all of its streams at once.
            self._due = self._turn + self._due % self._interval - self._interval
        self._go_on()

    def _go_on(self) -> None:
        if self._left == 0:
            self._timer = None
            self._transport.write(_END)
            return
        self._left -= 1
        stamp = b'{"index":0,"delta":{"content":"%d"},"logprobs":null,"finish_reason":null}' % time.time_ns()
        self._transport.write(_event(stamp))
        if self._interval:
            self._due += self._interval
            if self._turn and self._due >= self._turn + TURN:
                self._due += self._cycle - TURN
                self._turn += self._cycle
            self._timer = self._loop.call_at(self._due, self._go_on)
        else:
            self._timer = self._loop.call_soon(self._go_on)


async def main(port: int) -> None:
    """Serve until killed."""
    counts = Counts()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(counts), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))

"""Requests that are right, nearly right or wrong, drawn part by part, for hypothesis and for the fuzz alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

# Never to be seen upstream.
SECRET = b"s3cret"
BODY = b'{"messages":[]}'
_CHUNKS = b"f\r\n" + BODY + b"\r\n0\r\n\r\n"


class Choose(Protocol):
    """Takes one of several."""

    def __call__(self, several: Sequence[T], /) -> T: ...


def _mostly(right: Sequence[T], wrong: Sequence[T]) -> Sequence[T]:
    return [*right, *right, *right, *wrong]


_CHAT = b"POST /v1/chat/completions HTTP/1.1"
_LINES = _mostly(
    [_CHAT] * 8,
    [
        b"POST /v1/chat/completions?a=b HTTP/1.1",
        b"POST http://other/v1/chat/completions HTTP/1.1",
        b"POST /v1/chat/completions HTTP/1.0",
        b"POST /v1/chat/completions HTTP/2.0",
        b"POST /v1/chat/completions",
        b"POST  /v1/chat/completions  HTTP/1.1",
        b"post /v1/chat/completions HTTP/1.1",
        b"POST /v1/chat/%63ompletions HTTP/1.1",
        b"POST /v1/chat/completions# HTTP/1.1",
        b"POST /sleep HTTP/1.1",
        b"CONNECT /v1/chat/completions HTTP/1.1",
    ],
)
_HOSTS = _mostly(
    [[b"Host: gateway"]] * 6,
    [
        [],
        [b"Host: gateway", b"Host: other"],
        [b"hOST:[::1]:80"],
        [b"Host: a b"],
        [b"Host:"],
        [b"Host : gateway"],
        [b"Host: user@gateway"],
    ],
)
_FRAMINGS: Sequence[tuple[list[bytes], bytes]] = _mostly(
    [([b"Content-Length: 15"], BODY), ([b"Transfer-Encoding: chunked"], _CHUNKS)] * 3,
    [
        ([], BODY),
        ([b"Content-Length: 15", b"Content-Length: 15"], BODY),
        ([b"Content-Length: 15", b"Content-Length: 0"], BODY),
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], _CHUNKS),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], _CHUNKS),
        ([b"Transfer-Encoding: xchunked"], _CHUNKS),
        ([b"Transfer-Encoding: chunked "], _CHUNKS),
        ([b"transfer-encoding:\tCHUNKED"], _CHUNKS),
        ([b"Transfer-Encoding: gzip, chunked"], _CHUNKS),
        ([b"Content-Length: +15"], BODY),
        ([b"Content-Length: 0015"], BODY),
        ([b"Content-Length: 15 "], BODY),
        ([b"Content-Length: 15,15"], BODY),
        ([b"Content-Length: 999999999999999999999"], BODY),
        ([b"Transfer-Encoding: chunked"], b"f;a=b\r\n" + BODY + b"\r\n0\r\nHost: x\r\n\r\n"),
        ([b"Transfer-Encoding: chunked"], b"-f\r\n" + BODY + b"\r\n0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked"], b"f\n" + BODY + b"\r\n0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked"], b"f\r\n" + BODY + b"0\r\n\r\n"),
    ],
)
_NAMES = _mostly(
    [b"X-A", b"x-b", b"Accept", b"Traceparent", b"Authorization", b"Cookie", b"Proxy-Authorization", b"X-Api-Key"],
    [
        *(b"TE", b"Trailer", b"Keep-Alive", b"Proxy-Connection", b"Upgrade", b"Expect", b"HTTP2-Settings", b"Api-Key"),
        *(
            b"X-Request-Id",
            b"Content-Type",
            b"Accept-Encoding",
            b"Content_Length",
            b"X-Forwarded-Host",
            b"!#$%&'*+-.^_`|~",
        ),
        *(b"", b" X", b"X ", b"X\t", b"X Y", b"X\0", b"X\xe9", b"X(", b"X\r", b"\tX"),
    ],
)
_SEPARATORS = _mostly([b": "] * 5, [b":", b":  ", b":\t", b" : ", b"", b": :", b":\r\n "])
_VALUES = _mostly(
    [b"1", SECRET, b"Bearer " + SECRET, b"a, b", b""],
    [
        b"100-continue",
        b"h2c",
        b"a\tb",
        b"a\0b",
        b"a\x7fb",
        b"\xff",
        b"a\nb: c",
        b"a\rb: c",
        b"a\r\n b",
        b"x" * 300,
        b" 1 ",
    ],
)
_NAMED = [
    *(b"x-a", b"X-B", b" traceparent ", b"close", b"keep-alive", b"upgrade", b"content-length", b"host", b"", b'"x"'),
    *(b"transfer-encoding", b"x-request-id", b"content-type", b"accept", b"connection"),
]
_OFFERS = _mostly(
    [[]] * 4,
    [
        [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"],
        [b"connection: upgrade", b"upgrade: websocket"],
        [b"Upgrade: h2c"],
    ],
)
_ENDS = _mostly([b"\r\n"] * 12, [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b" \r\n"])


def request(choose: Choose) -> bytes:
    """One request, or what looks like one."""
    framing, body = choose(_FRAMINGS)
    lines = [*choose(_HOSTS), *choose(_OFFERS), *framing]
    for _ in range(choose(range(4))):
        lines.append(choose(_NAMES) + choose(_SEPARATORS) + choose(_VALUES))
    for _ in range(choose([0, 0, 1, 1, 2])):
        lines.append(b"Connection: " + b",".join([choose(_NAMED) for _ in range(choose(range(1, 4)))]))
    ordered = [choose(_LINES)]
    while lines:
        ordered.append(lines.pop(choose(range(len(lines)))))
    # One odd end is enough to spoil a head.
    ends = [b"\r\n"] * (len(ordered) + 1)
    ends[choose(range(len(ends)))] = choose(_ENDS)
    return b"".join(map(bytes.__add__, [*ordered, b""], ends)) + body

"""Clients of HTTP/1.0, which knows no chunks: an answer without a length ends with the connection (RFC 9112, 6.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.support.fake_vllm import (
    CLOSE,
    DONE,
    EVENTS,
    RESET,
    STREAM_HEAD,
    UNTOLD,
    FakeVllm,
    Step,
    chunk,
    completion,
    response,
)
from tests.support.gateway_process import Gateway, running

CHAT = b"/v1/chat/completions"
WHOLE = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo"}'
STREAM = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo","stream":true}'
CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"ab") + chunk(b"c")
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"
CONTENT = b"".join(EVENTS)


@pytest.fixture
def gateway(fake: FakeVllm, way: None) -> Iterator[Gateway]:
    with running(fake.url) as started:
        yield started


def ask(gateway: Gateway, body: bytes, method: bytes = b"POST", target: bytes = CHAT, more: bytes = b"") -> bytes:
    """All that comes back until the connection closes."""
    with gateway.connect() as connection:
        length = b"content-length: %d\r\n" % len(body) if method == b"POST" else b""
        connection.sendall(b"%b %b HTTP/1.0\r\n%b%b\r\n%b" % (method, target, length, more, body))
        got = b""
        while piece := connection.recv(65536):
            got += piece
    return got


def parts(answer: bytes) -> tuple[bytes, list[bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    return line, [header.partition(b":")[0].lower() for header in headers], body


@pytest.mark.parametrize(
    ("asked", "script", "content"),
    [
        (STREAM, None, CONTENT),
        (b'{"messages":{"user":"Hi"}}', None, b"".join(UNTOLD)),
        (b'{"messages":{"user":"Hi"},"stream_style":"repr"}', None, None),
        (STREAM, [STREAM_HEAD, chunk(EVENTS[0]), RESET], None),
        (WHOLE, [CHUNKS + b"0\r\n\r\n"], b"abc"),
        (WHOLE, [UNTIL_CLOSED, b"abc", CLOSE], b"abc"),
        (b'{"prompt":"Hi","stream":true}', [STREAM_HEAD, chunk(DONE), b"0\r\n\r\n"], None),
    ],
    ids=["stream", "simplified", "repr", "a stream that breaks", "chunks", "until it closes", "generate"],
)
@pytest.mark.parametrize("more", [b"", b"connection: keep-alive\r\n"], ids=["", "keep-alive"])
def test_an_answer_without_a_length_ends_with_the_connection(
    fake: FakeVllm, gateway: Gateway, asked: bytes, script: Sequence[Step] | None, content: bytes | None, more: bytes
) -> None:
    if script is not None:
        fake.queue(script)
    target = b"/generate" if b"prompt" in asked else CHAT
    line, headers, body = parts(ask(gateway, asked, target=target, more=more))
    assert line == b"HTTP/1.1 200 OK"
    assert not {b"transfer-encoding", b"content-length"} & set(headers)
    if content is not None:
        assert body == content
    assert b"\r\n" not in body


def test_an_answer_that_has_a_length_keeps_it(fake: FakeVllm, gateway: Gateway) -> None:
    for method, target, asked in ((b"POST", CHAT, WHOLE), (b"GET", b"/v1/models", b""), (b"GET", b"/metrics", b"")):
        line, headers, body = parts(ask(gateway, asked, method, target))
        assert (line, b"transfer-encoding" in headers) == (b"HTTP/1.1 200 OK", False)
        assert headers.count(b"content-length") == 1
        assert body
    for asked in (b"{", b'{"messages":{}}'):
        line, headers, body = parts(ask(gateway, asked))
        assert line.startswith(b"HTTP/1.1 400 ")
        assert (b"content-length" in headers, b"transfer-encoding" in headers) == (True, False)


def test_our_own_stream_ends_with_the_connection_too(gateway: Gateway) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"GET /v1/status/stream HTTP/1.0\r\n\r\n")
        got = b""
        while b"\r\n\r\n" not in got or b"data: " not in got:
            got += connection.recv(65536)
    _, headers, body = parts(got)
    assert b"transfer-encoding" not in headers
    assert body.startswith((b"data: ", b"event: "))


@pytest.mark.parametrize("script", [[CHUNKS, RESET], [CHUNKS, CLOSE]], ids=["reset", "closed"])
def test_an_answer_that_breaks_off_is_no_end(fake: FakeVllm, gateway: Gateway, script: Sequence[Step]) -> None:
    fake.queue(script)
    with pytest.raises(ConnectionResetError):
        ask(gateway, WHOLE)


def test_nothing_is_said_before_the_answer(fake: FakeVllm, gateway: Gateway) -> None:
    """RFC 9110, 10.1.1: it knows no 100 (Continue), whatever it expects."""
    got = ask(gateway, WHOLE, more=b"expect: 100-continue\r\n")
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")
    assert got.endswith(completion())


def test_an_answer_without_a_body_has_none(fake: FakeVllm, gateway: Gateway) -> None:
    fake.queue([b"HTTP/1.1 204 No Content\r\n\r\n"], [response("200 OK", b"")])
    assert parts(ask(gateway, WHOLE))[2] == b""
    assert parts(ask(gateway, WHOLE))[2] == b""
    assert parts(ask(gateway, b"", b"HEAD", b"/v1/models"))[2] == b""

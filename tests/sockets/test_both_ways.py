"""The shortcut and the app give the same conversations, byte for byte; scripts play them on both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.admission.turns import FewAtATime
from gateway.server.http_protocol import HttpProtocol, SharedState, missing_names
from gateway.server.shortcut import Shortcut
from gateway.wire.heads import answer_head
from tests.support.fake_vllm import (
    CLOSE,
    DONE,
    EVENTS,
    RESET,
    STREAM_HEAD,
    FakeVllm,
    Hold,
    Received,
    Step,
    chunk,
    completion,
    response,
)
from tests.support.gateway_process import running
from tests.support.recorders import ConnectionRecorder, Conversation, FakeClock
from tests.support.sink import Sink

CHAT = b"/v1/chat/completions"
WHOLE = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo"}'
STREAM = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo","stream":true}'
SIMPLIFIED = b'{"messages":{"user":"Hi"},"streaming":false}'
LONG = b"x" * 2000


def post(
    body: bytes = WHOLE, *headers: bytes, target: bytes = CHAT, version: bytes = b"1.1", name: bytes = b"a"
) -> bytes:
    lines = [b"POST %b HTTP/%b" % (target, version), b"Host: x", b"x-request-id: " + name, *headers]
    if not any(header.lower().startswith(b"transfer-encoding") for header in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(target: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, target), b"Host: x", b"x-request-id: g", *headers]) + b"\r\n\r\n"


def singly(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


BYE = b"Connection: close"
CHUNKED = b"Transfer-Encoding: chunked"
OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
LAST = post(WHOLE, BYE, name=b"last")
GARBAGE = b"\x16\x03\x01\x02\x00 what is this\r\n\r\n"

# What the client sends, in turn. Text is waited for in what comes back, a callable does something to the connection.
# A list is a call in several writes, whose answer is waited for.
Sent = bytes | str | list[bytes] | Callable[[socket.socket], None]


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


SCRIPTS: dict[str, Sequence[Sent]] = {
    "one call": [LAST],
    "one stream": [post(STREAM, BYE)],
    "the simplified form": [post(SIMPLIFIED, BYE)],
    "calls one after the other": [post(), '"usage"', post(STREAM), "[DONE]", post(SIMPLIFIED), '"text"', LAST],
    "calls that differ in their length alone": [
        post(),
        '"usage"',
        post(WHOLE + b" " * 99),
        '"usage"',
        post(STREAM),
        "[DONE]",
        post(b"{"),
        "400",
        post(),
        '"usage"',
        LAST,
    ],
    "a call like the one before, in pieces": [
        post(),
        '"usage"',
        post()[:30],
        post()[30:-9],
        post()[-9:],
        '"usage"',
        LAST,
    ],
    "two calls like the one before": [post(), '"usage"', post() + post(), '"usage"', '"usage"', LAST],
    "garbage behind a call like the one before": [post(), '"usage"', post() + GARBAGE],
    "a body that is too large, after a call like it": [post(), '"usage"', post(b"x" * 2600), "413", LAST],
    "head and body apart": [post()[: -len(WHOLE)], WHOLE, '"usage"', LAST],
    "byte by byte": [*singly(post()), '"usage"', LAST],
    "two in one write": [post() + LAST],
    "four in one write, on mixed paths": [post(name=b"1") + get(b"/health") + post(STREAM, name=b"2") + LAST],
    "the app's first, then ours": [get(b"/health") + post(name=b"1") + get(b"/nowhere") + LAST],
    "many in one write": [b"".join(post(name=b"%d" % number) for number in range(20)) + LAST],
    "with a query": [post(target=CHAT + b"?a=b", name=b"1"), '"usage"', LAST],
    "absolute form": [post(target=b"http://x" + CHAT), '"usage"', LAST],
    "models": [get(b"/v1/models"), "list", get(b"/v1/models", BYE)],
    "models, by HEAD": [get(b"/v1/models", method=b"HEAD"), "\r\n\r\n", LAST],
    "a model by its id": [get(b"/v1/models/demo"), "max_model_len", get(b"/v1/models/a%2Fb"), "404", LAST],
    "pages": [post(WHOLE, b"Origin: http://y"), "403", post(WHOLE, b"Sec-Fetch-Site: cross-site"), "403", LAST],
    "what there is not": [get(CHAT), "405", get(b"/v1/engines"), "404", post(target=CHAT + b"/"), "404", LAST],
    "methods nobody has": [get(CHAT, method=b"DELETE"), "405", get(CHAT, method=b"OPTIONS"), "405", LAST],
    "a wrong body": [post(b"{"), "400", post(b"[]"), "400", LAST],
    "a body that is too large": [post(b"x" * 3000), "413", LAST],
    "a body that is too large, in chunks": [post(chunk(b"x" * 3000) + b"0\r\n\r\n", CHUNKED), "413", LAST],
    "a body that is compressed": [post(WHOLE, b"Content-Encoding: gzip"), "415", LAST],
    "Expect": [post(WHOLE, b"Expect: 100-continue")[: -len(WHOLE)], "100 Continue", WHOLE, '"usage"', LAST],
    "Expect, with the body": [post(WHOLE, b"Expect: 100-continue"), '"usage"', LAST],
    "chunked": [post(chunk(WHOLE[:5]) + chunk(WHOLE[5:]) + b"0\r\n\r\n", CHUNKED), '"usage"', LAST],
    "chunked, with trailers": [post(chunk(WHOLE) + b"0\r\nx-late: 1\r\n\r\n", CHUNKED), '"usage"', LAST],
    "a wrong chunk": [post(b"zz\r\n", CHUNKED)],
    "a wrong chunk of the second": [post() + post(b"zz\r\n", CHUNKED)],
    "a wrong chunk of one that waits": [post(name=b"1") + post(name=b"2") + post(b"zz\r\n", CHUNKED)],
    "a wrong chunk after the answer": [post(b"bb8\r\n" + b"x" * 3000 + b"\r\n", CHUNKED), "413", b"zz\r\n"],
    "upgrade to HTTP/2": [post(WHOLE, *OFFER) + post(name=b"never")],
    "upgrade to HTTP/2 after a call": [post(), '"usage"', post(WHOLE, *OFFER) + post(name=b"never")],
    "upgrade to HTTP/2 behind a call": [post() + post(STREAM, *OFFER) + post(name=b"never")],
    "upgrade to HTTP/2, byte by byte": singly(post(STREAM, *OFFER)),
    "upgrade to HTTP/2, in chunks": [post(chunk(WHOLE) + b"0\r\n\r\n", *OFFER, CHUNKED) + post(name=b"never")],
    "upgrade to HTTP/2, by Expect": [
        post(WHOLE, *OFFER, b"Expect: 100-continue")[: -len(WHOLE)],
        "100 Continue",
        WHOLE,
    ],
    "upgrade to HTTP/2, a body that is too large": [post(b"x" * 9000, *OFFER)],
    "upgrade to a web socket": [
        get(b"/v1/models", b"Connection: Upgrade", b"Upgrade: websocket") + post(name=b"never")
    ],
    "HTTP/1.0": [post(version=b"1.0")],
    "HTTP/1.0, a stream": [post(STREAM, version=b"1.0")],
    "HTTP/1.0, kept alive": [post(WHOLE, b"Connection: keep-alive", version=b"1.0")],
    "garbage": [GARBAGE],
    "garbage after a call": [post(), '"usage"', GARBAGE],
    "garbage behind a call": [post() + GARBAGE],
    "garbage behind two calls": [post(name=b"1") + get(b"/health") + GARBAGE],
    "garbage behind a stream": [post(STREAM) + GARBAGE],
    "an empty line before a call": [b"\r\n" + post(), '"usage"', b"\r\n", LAST],
    "a header without a name": [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n"],
    "two lengths": [post(WHOLE, b"Content-Length: 3")],
    "length and chunks": [post(WHOLE, CHUNKED, b"Content-Length: 3")],
    "no host": [LAST.replace(b"Host: x\r\n", b"")],
    "half-closed between calls": [post(), '"usage"', half_close],
    "half-closed with nothing said": [half_close],
    "many headers": [post(WHOLE, *(b"x-%d: %b" % (number, LONG[:50]) for number in range(50))), '"usage"', LAST],
}

# What the upstream does with the first call; the next get its usual answer.
UPSTREAM: dict[str, Sequence[Step]] = {
    "an empty answer": [response("200 OK", b"")],
    "no content": [b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n"],
    "not modified": [b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n'],
    "a status nobody knows": [response("299 Whatever", b"{}")],
    "an error": [response("500 Internal Server Error", b'{"error":{}}', "retry-after: 7")],
    "chunked, and no stream": [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"ab") + chunk(b"c") + b"0\r\n\r\n"
    ],
    "until it closes": [b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nabc", CLOSE],
    "a cut": [b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", CLOSE],
    "a reset": [RESET],
    "no HTTP": [b"hello\r\n\r\n", CLOSE],
    "a stream that breaks": [STREAM_HEAD + chunk(EVENTS[0]), RESET],
    "a stream that ends too soon": [STREAM_HEAD + chunk(EVENTS[0]) + b"0\r\n\r\n"],
    "half an event": [STREAM_HEAD + chunk(EVENTS[0][:20]), CLOSE],
    "a stream in one piece": [STREAM_HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"],
    "a stream cut inside its events": [
        STREAM_HEAD + chunk(EVENTS[0] + EVENTS[1][:9]) + chunk(EVENTS[1][9:]) + chunk(DONE) + b"0\r\n\r\n"
    ],
}


class InOnePiece(FakeVllm):
    """Its answers come in one read each, as the chunks of a relayed stream follow the reads."""

    def script_for(self, request: Received) -> Sequence[Step]:
        joined: list[Step] = []
        for step in super().script_for(request):
            before = joined[-1] if joined else None
            if isinstance(step, bytes) and isinstance(before, bytes):
                joined[-1] = before + step
            else:
                joined.append(step)
        return joined


def without_dates(data: bytes) -> bytes:
    data = re.sub(rb"date: [^\r]+", b"date: D", data)
    return re.sub(rb"[0-9a-f]{32}", b"ID", data)


def talk(connection: socket.socket, script: Sequence[Sent]) -> bytes:
    """All that came back until the gateway closed."""
    got, seen = b"", 0
    connection.settimeout(20)
    for step in script:
        if isinstance(step, bytes):
            connection.sendall(step)
        elif isinstance(step, str):
            while (at := got.find(step.encode(), seen)) < 0:
                data = connection.recv(65536)
                assert data, f"closed before {step!r} came, after {got!r}"
                got += data
            seen = at + len(step)
        elif isinstance(step, list):
            if b"connection: close" in got:
                break
            answers = got.count(b"x-request-id: ")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused at an earlier write, and closed
                for write in step:
                    connection.sendall(write)
            while got.count(b"x-request-id: ") == answers:
                data = connection.recv(65536)
                assert data, f"closed before an answer to {step!r} came, after {got!r}"
                got += data
        else:
            step(connection)
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            got += data
    return without_dates(got)


class Both:
    """A gateway that takes the shortcut and one that does not, each with an upstream of its own."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._ways = []
        for shortcut in (True, False):
            fake = stack.enter_context(InOnePiece())
            fake.close_after_probes()  # a reset on a connection that was idle is asked once more
            gateway = stack.enter_context(running(fake.url, shortcut=shortcut, max_body_bytes=2500))
            self._ways.append((fake, gateway))

    def play(self, script: Sequence[Sent], answer: Sequence[Step] | None = None) -> tuple[bytes, bytes]:
        """What the client got and what the upstream was sent, the same on both ways."""
        seen = []
        for fake, gateway in self._ways:
            fake.received.clear()
            if answer is not None:
                fake.queue(answer)
            with gateway.connect() as connection:
                got = talk(connection, script)
            sent = repr([(one.method, one.target, one.headers, one.body) for one in fake.received])
            seen.append((got, without_dates(sent.replace(f":{fake.port}", ":PORT").encode())))
        assert seen[0] == seen[1]
        return seen[0]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    with contextlib.ExitStack() as stack:
        yield Both(stack)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_connection_goes_alike_on_both_ways(both: Both, script: Sequence[Sent]) -> None:
    got, _ = both.play(script)
    assert got.startswith(b"HTTP/1.1 ") or script == [half_close]


@pytest.mark.parametrize("body", [WHOLE, STREAM, SIMPLIFIED])
@pytest.mark.parametrize("more", [(), (CHUNKED,)], ids=["length", "chunks"])
def test_an_offer_of_another_protocol_is_ignored(both: Both, body: bytes, more: tuple[bytes, ...]) -> None:
    content = chunk(body[:9]) + chunk(body[9:]) + b"0\r\n\r\n" if more else body
    answered, sent = both.play([post(content, BYE, *more)])
    assert both.play([post(content, *OFFER, *more) + post(name=b"never")]) == (answered, sent)
    assert sent.count(b"'POST'") == 1


@pytest.mark.parametrize("body", [WHOLE, STREAM, SIMPLIFIED], ids=["whole", "stream", "simplified"])
@pytest.mark.parametrize("answer", UPSTREAM.values(), ids=UPSTREAM)
def test_what_an_upstream_does_looks_alike_on_both_ways(both: Both, answer: Sequence[Step], body: bytes) -> None:
    got, _ = both.play([post(body, BYE)], answer)
    assert got.startswith(b"HTTP/1.1 ")


def test_pipelined_calls_go_upstream_once_each_and_in_turn(both: Both) -> None:
    got, sent = both.play([post(name=b"1") + post(STREAM, name=b"2") + LAST])
    assert [got.count(b"x-request-id: " + name) for name in (b"1", b"2", b"last")] == [1, 1, 1]
    assert got.index(b"x-request-id: 1") < got.index(b"x-request-id: 2") < got.index(b"x-request-id: last")
    assert sent.count(b"'POST'") == 3


def test_a_refusal_is_never_written_into_an_answer(both: Both) -> None:
    got, _ = both.play([post(STREAM) + GARBAGE])
    answer, _, refusal = got.partition(b"0\r\n\r\n")
    assert answer.endswith(DONE + b"\r\n")
    assert refusal.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"type":"invalid_request_error"' in refusal


def test_garbage_that_is_sent_on_while_an_answer_runs_is_not_looked_at() -> None:
    for shortcut in (True, False):
        hold = Hold()
        with InOnePiece() as fake, running(fake.url, shortcut=shortcut) as gateway, gateway.connect() as connection:
            fake.queue([hold, response("200 OK", completion())])
            connection.sendall(post() + GARBAGE)
            fake.wait_for_request()
            connection.sendall(GARBAGE * 10)
            hold.release()
            got = talk(connection, [])
        assert got.count(b"HTTP/1.1 200") == got.count(b"HTTP/1.1 400") == 1


def test_half_closed_in_a_stream_is_leaving_on_both_ways() -> None:
    for shortcut in (True, False):
        with InOnePiece() as fake, running(fake.url, shortcut=shortcut) as gateway, gateway.connect() as connection:
            fake.queue([STREAM_HEAD + chunk(EVENTS[0]), Hold()])
            talked = talk(connection, [post(STREAM), "assistant", half_close])
            assert fake.received[0].closed.wait(10)
            assert not talked.endswith(b"0\r\n\r\n")
            assert gateway.log(1)[0]["outcome"] == "client_left"


def test_a_client_that_leaves_in_its_first_call_has_its_second_not_made() -> None:
    for shortcut in (True, False):
        hold = Hold()
        with InOnePiece() as fake, running(fake.url, shortcut=shortcut) as gateway:
            fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, chunk(EVENTS[1]), Hold()])
            with gateway.connect() as connection:
                connection.sendall(post(STREAM) + post(name=b"never"))
                assert hold.reached.wait(10)
                # Left unread, the beginning of the answer makes the close a reset, which the next write meets: while
                # the second waits the connection is not read, and the leaving itself not seen.
                assert connection.recv(1, socket.MSG_PEEK)
            hold.release()
            if shortcut:
                assert fake.received[0].closed.wait(10)
            assert len(fake.received) == 1


def test_trailers_do_not_go_upstream(both: Both) -> None:
    _, sent = both.play([post(chunk(WHOLE) + b"0\r\nx-late: 1\r\n\r\n", CHUNKED, BYE)])
    assert b"x-late" not in sent


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "app"])
def test_streams_that_are_open_at_the_end_are_brought_to_theirs(shortcut: bool) -> None:
    holds = [Hold() for _ in range(3)]
    got: list[bytes] = []
    with InOnePiece() as fake, contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []

        def finish() -> None:
            # The gateway has begun to stop once it takes no new connection.
            with contextlib.suppress(OSError):
                while True:
                    gateway.connect().close()
            for hold in holds:
                hold.release()
            got.extend(talk(connection, []) for connection in connections)

        finisher = threading.Thread(target=finish)
        with running(fake.url, shortcut=shortcut, drain_timeout=20) as gateway:
            for hold in holds:
                fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), b"0\r\n\r\n"])
                connections.append(stack.enter_context(gateway.connect()))
                connections[-1].sendall(post(STREAM))
                assert hold.reached.wait(10)
            connections.append(stack.enter_context(gateway.connect()))
            connections[-1].sendall(post())  # idle by then
            while b'"usage"' not in connections[-1].recv(65536):
                pass
            finisher.start()
        finisher.join()
    whole = STREAM_HEAD.split(b"\r\n", 1)[0]
    assert all(one.startswith(whole) and one.endswith(DONE + b"\r\n0\r\n\r\n") for one in got[:3])
    assert got[0] == got[1] == got[2]
    assert got[3] == b""


class _Loop(FakeClock):
    """A loop whose time a test passes, and whose tasks run at once."""

    def create_task(self, work: Any) -> Any:
        with contextlib.suppress(StopIteration):
            work.send(None)
        return self

    def add_done_callback(self, callback: Any) -> None:
        callback(self)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


class _Answering(Conversation):
    """A data path whose upstream answers at once."""

    def connect_now(self, upstream: Any, exchange: Any, *, fresh: bool) -> None:
        exchange.upstream_connected(ConnectionRecorder())
        exchange.upstream_head(*answer_head(200, [(b"content-length", b"2")]))
        exchange.upstream_body(b"{}")
        exchange.upstream_end()


@pytest.mark.parametrize("protocol", [Shortcut, HttpProtocol])
def test_a_connection_is_kept_for_hours_and_closed_once_it_is_idle_for_too_long(
    protocol: type[HttpProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, data = Sink(), _Answering()
    clock: Any = _Loop()  # the part of an event loop that is asked for
    monkeypatch.setattr(data.transport, "connect", data.connect_now)
    config = uvicorn.Config(_app, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=75)
    parts = SimpleNamespace(data_path=data.path, metrics_port=None)  # those that are asked for
    connection = protocol(config, SharedState(), {"parts": parts}, _loop=clock)
    connection.server_state.few = FewAtATime(lambda call: None)  # no loop runs
    connection.connection_made(transport)
    for number in range(1, 201):
        connection.data_received(post())
        assert transport.written.count(b"HTTP/1.1 200 OK") == number
        assert len(clock.timers) <= 1
        clock.advance(74.9)
        assert not transport.closed
    clock.advance(0.2)
    assert transport.closed
    connection.connection_lost(None)
    assert not clock.timers


def test_the_installed_uvicorn_has_all_that_the_shortcut_needs() -> None:
    assert missing_names(HttpToolsProtocol) == []


def test_a_uvicorn_that_lacks_something_is_named_for_it() -> None:
    class Other(asyncio.Protocol):
        def __init__(self) -> None:
            self.cycle = None

        def on_body(self, body: bytes) -> None: ...

    lacking = missing_names(Other)
    assert {"on_headers_complete", "send_400_response", "pipeline"} <= set(lacking)
    assert not {"on_body", "cycle", "data_received"} & set(lacking)


BODIES = st.sampled_from([WHOLE, WHOLE + b" " * 300, STREAM, SIMPLIFIED, b"{", b"", b"x" * 2600])
HEADER = st.sampled_from(
    [b"X-A: 1", b"Content-Type: application/json", b"Content-Encoding: gzip", b"Cookie: a=b", b"Host: y", b"X: y\r\n z"]
)
SPELLING = st.sampled_from([b"Content-Length: ", b"content-length: ", b"Content-Length:", b"Content-Length: 0"])


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """A call in one to three writes, often not quite right."""
    sent = post(draw(BODIES), *draw(st.lists(HEADER, max_size=1))).replace(b"Content-Length: ", draw(SPELLING))
    cuts = sorted(draw(st.lists(st.integers(1, len(sent) - 1), max_size=2, unique=True)))
    return [sent[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(sent)])]


@given(calls=st.lists(messages(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_calls_of_every_kind_after_a_usual_one_go_alike(both: Both, calls: list[list[bytes]]) -> None:
    writes = [write for call in calls for write in ([post()], call)]
    both.play([*writes, [LAST]])

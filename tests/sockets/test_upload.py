"""Uploads, which go up while they come: scripted, and on sockets in front of a server that takes its time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.admission.owners import Owner
from gateway.relay.upload import HELD
from gateway.server.asgi import _AsgiClient
from gateway.upstream.credentials import FixedKey
from gateway.wire.heads import Header
from tests.support.fake_vllm import DONE, FakeVllm, response
from tests.support.gateway_process import Gateway, running
from tests.support.ports import free_port
from tests.support.recorders import LIMITS, TRANSCRIPTIONS, Conversation

PATH = "/v1/audio/transcriptions"
KIND = (b"content-type", b"multipart/form-data; boundary=b")
JSON: list[Header] = [(b"content-type", b"application/json"), (b"content-length", b"13")]
TEXT = b'{"text":"Hi"}'
# Enough to be sent on.
FIRST = b"x" * (HELD + 1)


def upload(
    length: int | None = len(FIRST) + 9, *, upstreams: int = 1, max_in_flight_per_upstream: int = 4
) -> Conversation:
    """An upload whose head says this length, or none."""
    headers = (KIND,) if length is None else (KIND, (b"content-length", b"%d" % length))
    return Conversation(
        route=TRANSCRIPTIONS,
        headers=headers,
        upstreams=upstreams,
        max_in_flight_per_upstream=max_in_flight_per_upstream,
    )


def answer(talk: Conversation) -> None:
    talk.head(200, JSON)
    talk.exchange.upstream_body(TEXT)
    talk.exchange.upstream_end()


def test_pieces_go_up_as_they_come() -> None:
    talk = upload()
    talk.begin()
    talk.exchange.request_body(FIRST)
    assert talk.transport.asked == [(talk.upstreams[0], True)]
    connection = talk.connect()
    assert connection.request_line == b"POST /v1/audio/transcriptions HTTP/1.1"
    assert dict(connection.request_headers)[b"content-length"] == b"%d" % (len(FIRST) + 9)
    assert dict(connection.request_headers)[b"content-type"] == KIND[1]
    for piece in (b"abc", b"def", b"ghi"):
        talk.exchange.request_body(piece)
        assert connection.sent.endswith(piece)
    talk.exchange.request_end()
    answer(talk)
    assert connection.request_body == FIRST + b"abcdefghi"
    assert connection.given_back == "released"
    assert talk.client.content == TEXT
    assert talk.exchange.outcome == "done"
    talk.assert_settled()


def test_what_may_not_come_takes_no_place_upstream() -> None:
    talk = upload()
    talk.begin()
    talk.exchange.request_body(b"x")
    talk.exchange.awaits_more()
    assert talk.transport.asked == []
    assert talk.upstreams[0].in_flight == 0
    talk.clock.advance(LIMITS.body_timeout + 1)
    assert talk.client.status == 408
    talk.assert_settled()


def test_one_that_waits_for_room_holds_no_more_than_there_is() -> None:
    talk = Conversation(
        route=TRANSCRIPTIONS, headers=(KIND,), max_in_flight_per_upstream=1, max_buffered_bytes=HELD + 20_000
    )
    talk.crowd(1)
    talk.begin()
    talk.exchange.request_body(FIRST)
    assert talk.client.status == 0
    talk.exchange.request_body(b"x" * 20_000)
    assert talk.client.status == 503
    assert talk.client.error["code"] == "gateway_shortage"
    talk.assert_settled()


def test_what_does_not_say_how_long_it_is_goes_up_in_chunks() -> None:
    talk = upload(None)
    talk.begin()
    talk.exchange.request_body(FIRST)
    connection = talk.connect()
    talk.exchange.request_body(b"0123456789abcdef0")
    talk.exchange.request_end()
    assert dict(connection.request_headers)[b"transfer-encoding"] == b"chunked"
    assert b"content-length" not in dict(connection.request_headers)
    assert connection.request_body == b"10001\r\n" + FIRST + b"\r\n11\r\n0123456789abcdef0\r\n0\r\n\r\n"
    answer(talk)
    talk.assert_settled()


@pytest.mark.parametrize("length", [None, 6])
def test_what_came_before_the_connection_goes_up_with_the_head(length: int | None) -> None:
    talk = upload(length)
    talk.begin()
    talk.exchange.request_body(b"abc")
    talk.exchange.request_body(b"def")
    talk.exchange.request_end()
    sent = talk.connect().request_body
    assert sent == (b"abcdef" if length else b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n")
    answer(talk)
    talk.assert_settled()


def test_the_client_waits_for_the_connection_and_for_the_upstream() -> None:
    talk = upload(HELD + 1)
    talk.begin()
    talk.exchange.request_body(b"x" * HELD)
    assert not talk.client.waits()
    talk.exchange.request_body(b"x")
    assert talk.client.waits()
    talk.connect()
    assert not talk.client.waits()
    talk.exchange.upstream_paused()
    assert talk.client.waits()
    talk.exchange.upstream_resumed()
    assert not talk.client.waits()
    talk.exchange.request_end()
    talk.exchange.upstream_paused()
    assert not talk.client.waits(), "there is nothing to wait with"
    answer(talk)
    talk.assert_settled()


def test_an_end_that_comes_with_what_fills_the_connection_is_the_end_of_waiting() -> None:
    talk = upload(None)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.exchange.upstream_paused()
    talk.exchange.request_end()
    assert not talk.client.waits()
    answer(talk)
    talk.assert_settled()


def test_a_connection_that_is_full_at_once_keeps_the_client_waiting() -> None:
    talk = upload(LIMITS.max_body_bytes)
    talk.begin()
    talk.exchange.request_body(b"x" * (HELD + 1))
    talk.connect(during_send=talk.exchange.upstream_paused)
    assert talk.client.waits()
    talk.exchange.upstream_resumed()
    assert not talk.client.waits()
    talk.leave()
    talk.assert_settled()


def test_one_that_is_too_large_is_refused_by_its_head_or_when_it_is() -> None:
    talk = upload(LIMITS.max_body_bytes + 1)
    talk.begin()
    assert talk.client.status == 413
    assert talk.transport.asked == []
    talk.assert_settled()

    talk = upload(None)
    talk.begin()
    talk.exchange.request_body(FIRST)
    connection = talk.connect()
    talk.exchange.request_body(b"x" * (LIMITS.max_body_bytes - len(FIRST)))
    assert talk.client.status == 0
    talk.exchange.request_body(b"x")
    talk.exchange.request_body(b"x")
    talk.exchange.request_end()
    assert (talk.client.status, connection.given_back) == (413, "discarded")
    assert talk.client.error["message"].startswith("The request's body must be at most")
    talk.assert_settled()


@pytest.mark.parametrize(
    ("given", "said"), [(b"application/json", "'application/json'"), (b"", "missing"), (b"\xff" * 99, repr("ÿ" * 40))]
)
def test_what_is_no_form_is_refused(given: bytes, said: str) -> None:
    talk = Conversation(route=TRANSCRIPTIONS, headers=((b"content-type", given),))
    talk.begin()
    assert (talk.client.status, talk.transport.asked) == (415, [])
    assert talk.client.error["message"] == f"Content-Type must be multipart/form-data, with a file, but it is {said}."
    talk.assert_settled()


def test_an_answer_before_the_end_goes_on_and_the_connection_is_not_used_again() -> None:
    talk = upload()
    talk.begin()
    talk.exchange.request_body(FIRST)
    connection = talk.connect()
    talk.exchange.request_body(b"abc")
    talk.head(400, JSON)
    talk.exchange.upstream_body(TEXT)
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content, connection.given_back) == (400, TEXT, "discarded")
    talk.exchange.request_body(b"def")
    talk.exchange.request_end()
    talk.assert_settled()


def test_a_connection_that_closes_while_it_is_sent_to_is_no_fault() -> None:
    talk = upload(upstreams=2)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.exchange.request_body(b"abc")
    talk.lose(answered=False)
    assert (talk.client.status, talk.upstreams[0].broken_in_a_row) == (502, 0)
    talk.assert_settled()


def test_nothing_is_sent_twice() -> None:
    talk = upload(upstreams=2)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.lose(answered=False)
    assert (talk.client.status, len(talk.transport.asked)) == (502, 1)
    talk.assert_settled()

    talk = upload(upstreams=2)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.head(503, JSON)
    assert len(talk.transport.asked) == 1
    talk.exchange.upstream_body(TEXT)
    talk.exchange.upstream_end()
    assert talk.client.status == 503
    talk.assert_settled()


def test_another_upstream_is_asked_where_this_one_takes_no_connection() -> None:
    talk = upload(upstreams=2)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.exchange.upstream_unreachable("connection refused")
    assert [fresh for _, fresh in talk.transport.asked] == [True, True]
    assert talk.connect().request_body == FIRST
    talk.leave()
    talk.assert_settled()


def test_one_that_waits_for_room_goes_up_when_there_is_some() -> None:
    talk = upload(max_in_flight_per_upstream=1)
    talk.crowd(1)
    talk.begin()
    talk.exchange.request_body(FIRST)
    assert talk.transport.asked == []
    talk.clock.advance(LIMITS.queue_timeout - 1)
    talk.crowd(0)
    talk.path.queue.wake()
    assert talk.connect().request_body == FIRST
    talk.clock.advance(LIMITS.body_timeout - 1)
    assert talk.client.status == 0, "it could not come while it waited"
    talk.clock.advance(2)
    assert talk.client.status == 408
    talk.assert_settled()


def test_one_that_stops_is_refused() -> None:
    talk = upload()
    talk.begin()
    talk.exchange.request_body(FIRST)
    connection = talk.connect()
    talk.clock.advance(LIMITS.body_timeout - 1)
    talk.exchange.request_body(b"abc")
    talk.clock.advance(LIMITS.body_timeout + 1)
    assert (talk.client.status, connection.given_back) == (408, "discarded")
    assert talk.exchange.outcome == "timeout:body"
    talk.assert_settled()


def test_the_time_in_which_the_upstream_takes_nothing_is_not_the_clients() -> None:
    talk = upload(len(FIRST) + 3)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.exchange.upstream_paused()
    talk.clock.advance(3 * LIMITS.body_timeout)
    talk.exchange.upstream_resumed()
    talk.clock.advance(LIMITS.body_timeout - 1)
    assert talk.client.status == 0
    talk.exchange.request_body(b"def")
    talk.exchange.request_end()
    talk.clock.advance(2 * LIMITS.body_timeout)
    assert talk.client.status == 0, "now it is the upstream's"
    talk.clock.advance(LIMITS.total_timeout)
    assert (talk.client.status, talk.exchange.outcome) == (504, "timeout:total")
    talk.assert_settled()


def test_a_stream_of_text_has_its_limits_and_its_end() -> None:
    talk = upload()
    talk.begin()
    talk.exchange.request_body(FIRST + b"abcdefghi")
    talk.exchange.request_end()
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    talk.exchange.upstream_body(b"data: {}\n\n")
    talk.clock.advance(LIMITS.idle_timeout + 1)
    assert talk.client.content.endswith(DONE)
    assert talk.exchange.outcome == "timeout:idle"
    talk.assert_settled()


def test_a_body_that_is_shorter_than_its_head_says_is_refused() -> None:
    talk = upload(len(FIRST) + 3)
    talk.begin()
    talk.exchange.request_body(FIRST)
    talk.connect()
    talk.exchange.request_end()
    assert (talk.client.status, talk.connections[0].given_back) == (400, "discarded")
    assert "not as long as its Content-Length says" in talk.client.error["message"]
    talk.assert_settled()


def test_our_key_goes_up() -> None:
    talk = Conversation(
        route=TRANSCRIPTIONS, headers=(KIND, (b"authorization", b"Bearer client")), credentials=FixedKey("k")
    )
    talk.begin()
    talk.exchange.request_body(FIRST)
    sent = talk.connect().request_headers
    assert [value for name, value in sent if name == b"authorization"] == [b"Bearer k"]
    talk.leave()
    talk.assert_settled()


class Slow:
    """An upstream that reads of an upload only what it is told to, in a thread of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.uploads: queue.Queue[socket.socket] = queue.Queue()
        self._probes: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(20)
                if connection.recv(4, socket.MSG_PEEK) == b"POST":
                    self.uploads.put(connection)
                else:
                    connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def slow() -> Iterator[Slow]:
    server = Slow()
    yield server
    server.close()


@pytest.fixture
def front(slow: Slow, way: None) -> Iterator[Gateway]:
    with running(slow.url, total_timeout=20, max_body_bytes=64 << 20) as gateway:
        yield gateway


def head(length: int) -> bytes:
    lines = f"POST {PATH} HTTP/1.1\r\nhost: gateway\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    return f"{lines}content-length: {length}\r\n\r\n".encode()


def send_what_is_taken(client: socket.socket, data: bytes) -> int:
    """How much goes out until nothing more is taken for half a second."""
    client.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += client.send(data[sent : sent + 65536])
    client.settimeout(20)
    return sent


def test_a_large_one_is_not_held(slow: Slow, front: Gateway) -> None:
    data = hashlib.sha256().digest() * (1 << 20)  # 32 MiB
    with front.connect() as client:
        client.sendall(head(len(data)))
        sent = send_what_is_taken(client, data)
        assert sent < len(data), "all of it was taken while nobody read it"
        with slow.uploads.get(timeout=20) as upstream, upstream.makefile("rb") as file:
            rest = threading.Thread(target=client.sendall, args=(data[sent:],))
            rest.start()
            while file.readline() != b"\r\n":
                pass
            assert file.read(len(data)) == data
            rest.join()
            upstream.sendall(response("200 OK", TEXT))
            with client.makefile("rb") as got:
                assert got.readline() == b"HTTP/1.1 200 OK\r\n"
    _, line = front.log(2)  # the first is of the probe that there cannot be an answer to
    assert (line["path"], line["status"], line["outcome"]) == (PATH, 200, "done")


def test_a_client_that_leaves_takes_its_upload_along(slow: Slow, front: Gateway) -> None:
    client = front.connect()
    client.sendall(head(2 * len(FIRST)) + FIRST + b"abc")
    with slow.uploads.get(timeout=20) as upstream:
        got = b""
        while not got.endswith(b"abc"):
            got += upstream.recv(65536)
        client.close()
        with contextlib.suppress(ConnectionResetError):
            assert upstream.recv(1000) == b""
    _, line = front.log(2)  # the first is of the probe that there cannot be an answer to
    assert line["outcome"] == "client_left"


def test_a_client_that_leaves_while_it_waits_takes_its_upload_along(slow: Slow, front: Gateway) -> None:
    client = front.connect()
    client.sendall(head(32 << 20))
    send_what_is_taken(client, bytes(32 << 20))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with slow.uploads.get(timeout=20):  # and nothing is read of it
        _, line = front.log(2)
    assert line["outcome"] == "client_left"
    assert line["total_s"] < 10


def test_a_reader_that_waits_is_woken_however_often_it_was_told_to_wait() -> None:
    async def wakes() -> None:
        client = _AsgiClient("", Owner())
        client.pause()
        waits = asyncio.create_task(client.readable())
        await asyncio.sleep(0)
        client.pause()
        client.resume()
        await asyncio.wait_for(waits, 5)

    asyncio.run(wakes())


@pytest.mark.usefixtures("way")
def test_a_form_goes_up_as_it_came(fake: FakeVllm, client: httpx.Client) -> None:
    fake.queue([response("200 OK", TEXT)])
    sound = bytes(range(256)) * 400
    got = client.post(PATH, data={"model": "demo"}, files={"file": ("a.wav", sound, "audio/wav")})
    assert (got.status_code, got.content) == (200, TEXT)
    sent = fake.received[0]
    assert sent.header("content-type") == got.request.headers["content-type"]
    assert sent.body == got.request.read()
    assert sound in sent.body


@pytest.mark.usefixtures("way")
def test_one_that_is_too_large_is_told_so_before_it_is_sent(fake: FakeVllm) -> None:
    with running(fake.url, max_body_bytes=1024) as gateway, gateway.connect() as client:
        client.sendall(head(1025).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
        with client.makefile("rb") as got:
            assert got.readline().startswith(b"HTTP/1.1 413 ")
            # Or the next request on it would be taken for the body, which rightly is not sent.
            assert b"connection: close\r\n" in got.readlines()
    assert fake.received == []


@pytest.mark.usefixtures("way")
def test_one_that_offers_another_protocol_goes_up_as_if_it_did_not(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.connect() as client:
        upgrade = b"\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n"
        client.sendall(head(5).replace(b"\r\n\r\n", upgrade) + b"so")
        client.sendall(b"und")
        with client.makefile("rb") as got:
            assert got.readline().startswith(b"HTTP/1.1 200 ")
    assert fake.received[0].body == b"sound"


@pytest.mark.usefixtures("way")
def test_one_that_nobody_takes_is_told_so(fake: FakeVllm) -> None:
    with running(f"http://127.0.0.1:{free_port()}") as gateway, gateway.client() as client:
        got = client.post(PATH, files={"file": b"x" * 200_000})
        assert got.status_code == 503
        assert orjson.loads(got.content)["error"]["code"] == "no_upstream_ready"


class UploadMachine(RuleBasedStateMachine):
    """An upload under every order of events; what it must do is in the recorders."""

    @initialize(sized=st.booleans(), crowded=st.booleans())
    def begin(self, sized: bool, crowded: bool) -> None:
        self.talk = upload(60_000 if sized else None, upstreams=2, max_in_flight_per_upstream=1)
        self.talk.crowd(int(crowded))
        self.dials_answered = 0
        self.all_came = self.head_came = False
        self.talk.begin()

    @property
    def over(self) -> bool:
        return bool(self.talk.client.ending)

    @property
    def lent(self) -> bool:
        last = self.talk.connections[-1] if self.talk.connections else None
        return last is not None and not last.given_back and not last.is_lost

    @property
    def dialling(self) -> bool:
        return len(self.talk.transport.asked) > self.dials_answered

    @precondition(lambda self: not self.all_came)
    @rule(size=st.sampled_from([10, 40_000]))
    def a_piece_comes(self, size: int) -> None:
        self.talk.exchange.request_body(b"x" * size)

    @precondition(lambda self: not self.all_came)
    @rule()
    def the_request_ends(self) -> None:
        self.all_came = True
        self.talk.exchange.request_end()

    @rule()
    def there_is_room(self) -> None:
        self.talk.crowd(0)
        self.talk.path.queue.wake()

    @precondition(lambda self: self.dialling)
    @rule(well=st.booleans())
    def a_dial_ends(self, well: bool) -> None:
        self.dials_answered += 1
        if well:
            self.talk.connect()
        else:
            self.talk.exchange.upstream_unreachable("connection refused")

    @precondition(lambda self: self.lent)
    @rule(full=st.booleans())
    def the_connection_fills_or_drains(self, full: bool) -> None:
        if full:
            self.talk.exchange.upstream_paused()
        else:
            self.talk.exchange.upstream_resumed()

    @precondition(lambda self: self.lent and not self.head_came)
    @rule(streams=st.booleans())
    def the_answer_begins(self, streams: bool) -> None:
        self.head_came = True
        self.talk.head(200, [(b"content-type", b"text/event-stream")] if streams else JSON)

    @precondition(lambda self: self.lent and self.head_came)
    @rule()
    def the_answer_goes_on(self) -> None:
        self.talk.exchange.upstream_body(b"data: {}\n\n")

    @precondition(lambda self: self.lent and self.head_came)
    @rule()
    def the_answer_ends(self) -> None:
        self.talk.exchange.upstream_end()

    @precondition(lambda self: self.lent)
    @rule()
    def the_connection_breaks(self) -> None:
        self.talk.lose(answered=self.head_came)

    @precondition(lambda self: not self.over)
    @rule(reads=st.booleans())
    def the_client_reads_or_not(self, reads: bool) -> None:
        if reads:
            self.talk.exchange.client_resumed()
        else:
            self.talk.exchange.client_paused()

    @rule(seconds=st.sampled_from([1.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.talk.clock.advance(seconds)

    @invariant()
    def a_client_waits_only_for_what_will_come(self) -> None:
        if self.all_came and self.lent and not self.over:
            assert not self.talk.client.waits()

    def teardown(self) -> None:
        if not self.over:
            self.talk.leave()
        if self.dialling:
            self.a_dial_ends(True)
        self.talk.assert_settled()


TestUpload = UploadMachine.TestCase
TestUpload.settings = settings(stateful_step_count=20)

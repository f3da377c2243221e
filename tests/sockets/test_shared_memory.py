"""What clients have the gateway hold is bounded in all, and who holds little is served beside who holds the most."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Iterator

import httpx
import pytest

from tests.support import fake_vllm, gateway_process
from tests.support.fake_vllm import DONE, STREAM_END, STREAM_HEAD, FakeVllm, Hold, Step, chunk, response
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
LIMIT, LARGER = 4 << 20, 32 << 20
WHOLE = b'{"model":"demo","messages":[{"role":"user","content":"Hi."}]}'
LARGE = fake_vllm.event({"content": "x" * 60_000})


@pytest.fixture(params=[LIMIT])
def front(fake: FakeVllm, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with running(fake.url, max_buffered_bytes=request.param, max_in_flight=128, max_queue=0) as gateway:
        yield gateway


@pytest.fixture
def other(front: Gateway) -> Iterator[httpx.Client]:
    """A client of another address."""
    with front.client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as client:
        yield client


@pytest.fixture
def hostile(front: Gateway) -> Iterator[Hostile]:
    with contextlib.ExitStack() as stack:
        yield Hostile(front, stack)


class Hostile:
    """Connections of one address, that are kept."""

    def __init__(self, gateway: Gateway, stack: contextlib.ExitStack) -> None:
        self._gateway = gateway
        self._stack = stack
        self.connections: list[socket.socket] = []

    def sends(self, data: bytes) -> None:
        """On a new connection, as far as that is taken."""
        connection = self._stack.enter_context(self._gateway.connect())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connections.append(connection)
        with contextlib.suppress(OSError):
            connection.sendall(data)

    def answers(self) -> list[bytes]:
        """What came for those that were answered, or cut, so far."""
        found = []
        poll = select.poll()
        by_number = {connection.fileno(): connection for connection in self.connections}
        for number in by_number:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            try:
                found.append(by_number[number].recv(1 << 16, socket.MSG_PEEK))
            except OSError:
                found.append(b"")
        return found


def held(client: httpx.Client) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("gateway_buffered_bytes ")]
    return float(line.rpartition(" ")[2])


def post(size: int, *, sent: int) -> bytes:
    """A call of so many bytes, of which so many are sent."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size
    return head + (WHOLE[:-1] + b',"user":"' + b"x" * size)[:sent]


def test_bodies_that_have_not_come_hold_half_and_the_slowest_end(hostile: Hostile, other: httpx.Client) -> None:
    for _ in range(32):
        hostile.sends(post(1_000_000, sent=200_000))
        assert other.post(CHAT, content=WHOLE).status_code == 200
    assert 0 < held(other) <= LIMIT / 2
    ended = hostile.answers()
    assert 20 < len(ended) < 32
    assert all(b" 503 " in one and b"came the slowest" in one and b"retry-after: 1" in one.lower() for one in ended)


def test_a_client_that_sends_in_pieces_is_served_beside_them(hostile: Hostile, other: httpx.Client) -> None:
    for _ in range(32):
        hostile.sends(post(1_000_000, sent=200_000))
    for _ in range(3):
        large = WHOLE[:-1] + b',"user":"' + b"x" * 500_000 + b'"}'
        assert other.post(CHAT, content=large).status_code == 200


def test_calls_that_run_hold_no_more_than_there_is(fake: FakeVllm, hostile: Hostile, other: httpx.Client) -> None:
    holds = [Hold() for _ in range(40)]
    scripts: list[list[Step]] = [[hold, response("200 OK", b"{}")] for hold in holds]
    fake.queue(*scripts)
    body = WHOLE[:-1] + b',"user":"' + b"x" * 500_000 + b'"}'
    call = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    for _ in range(12):
        hostile.sends(call)
    fake.wait_for_request(7)  # seven eighths of the room
    while len(hostile.answers()) < 5:
        held(other)
    assert all(b" 503 " in one and b"GATEWAY_MAX_BUFFERED_BYTES" in one for one in hostile.answers())
    assert held(other) == 7 * len(body)
    for hold in holds:
        hold.release()
    assert other.post(CHAT, content=WHOLE).status_code == 200
    while len(hostile.answers()) < 12:
        assert held(other) <= 7 * len(body)
    assert held(other) == 0


def test_heads_that_do_not_end_are_counted(hostile: Hostile, other: httpx.Client) -> None:
    for _ in range(100):
        hostile.sends(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 60_000)
        assert other.post(CHAT, content=WHOLE).status_code == 200
    assert 0 < held(other) <= LIMIT
    refused = [one for one in hostile.answers() if b" 503 " in one]
    assert refused
    assert b"\r\nretry-after: 1\r\n" in refused[0].lower()


@pytest.mark.parametrize("front", [LARGER], indirect=True)
def test_streams_that_nobody_reads_are_cut_where_there_is_no_room(
    fake: FakeVllm, front: Gateway, hostile: Hostile, other: httpx.Client
) -> None:
    endless = [STREAM_HEAD, *[chunk(LARGE)] * 200, chunk(DONE), STREAM_END]
    fake.queue(*[endless] * 120)
    stream = WHOLE[:-1] + b',"stream":true}'
    for _ in range(120):
        hostile.sends(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(stream), stream)
        )
    # Cut, or, where all is taken already, refused; an ASGI server tells an application only that the client has gone.
    outcomes = [front.log(1)[0]["outcome"] for _ in range(3)]
    may_be = {"refused", "shortage"} | (set() if gateway_process.SHORTCUT else {"client_left"})
    assert set(outcomes) <= may_be
    while set(outcomes) == {"refused"}:
        outcomes.append(front.log(1)[0]["outcome"])
    while held(other) > LARGER:  # what one turn of the loop brought is cut in the next
        continue
    fake.clear()
    assert other.post(CHAT, content=WHOLE).status_code == 200


def test_chunks_that_wait_to_be_read_are_counted(hostile: Hostile, other: httpx.Client) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for _ in range(40):
        hostile.sends(head + b"2\r\n  \r\n" * 35_000)
    got = other.post(CHAT, content=WHOLE)
    assert got.status_code == 200, got.text
    assert held(other) <= LIMIT


def test_health_checks_whose_answers_nobody_reads_wait(hostile: Hostile, other: httpx.Client) -> None:
    hostile.sends(b"")
    (connection,) = hostile.connections
    connection.settimeout(0.5)
    asked = b"GET /v1/health_check HTTP/1.1\r\nhost: x\r\n\r\n" * 1000
    with contextlib.suppress(OSError):
        for _ in range(400):  # 120 MB of answers
            connection.sendall(asked)
    assert held(other) < 1_000_000
    assert other.post(CHAT, content=WHOLE).status_code == 200


def test_chunks_whose_client_leaves_hold_up_nobody(front: Gateway, other: httpx.Client) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    first = b"%x\r\n%b\r\n" % (66_000, b" " * 66_000)
    for broken in (b"zz\r\n", b"0\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\nx: "):
        for _ in range(3):
            with front.connect() as connection:
                connection.sendall(head + first + b"1\r\n \r\n" * 20_000 + broken)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    large = WHOLE[:-1] + b',"user":"' + b"x" * 500_000 + b'"}'
    assert other.post(CHAT, content=large).status_code == 200
    while held(other):
        continue


@pytest.mark.parametrize("sent", [100_000, 1_000_000])
def test_requests_behind_one_that_runs_are_counted(
    fake: FakeVllm, hostile: Hostile, other: httpx.Client, sent: int
) -> None:
    hold = Hold()
    script: list[Step] = [hold, response("200 OK", b"{}")]
    fake.queue(*[script] * 60)
    first = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
    for _ in range(60):
        hostile.sends(first)
    fake.wait_for_request(60)
    for connection in hostile.connections:
        with contextlib.suppress(OSError):
            connection.sendall(post(100_000 if sent == 100_000 else 1_000_000, sent=100_000))
    while not held(other):
        continue
    assert held(other) <= LIMIT
    hold.release()
    assert other.post(CHAT, content=WHOLE).status_code == 200

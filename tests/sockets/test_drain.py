"""The gateway ends: it says so, accepts no more, answers what it has, and tells what it cannot answer any more."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import orjson
import pytest

from gateway.server import http_protocol
from gateway.server.uvicorn_server import Server
from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
WHOLE = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}]}
STREAM = {**WHOLE, "stream": True}


def accepts(gateway: Gateway) -> bool:
    with contextlib.suppress(OSError), gateway.connect():
        return True
    return False


def wait_until(done: Callable[[], bool], else_: str) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until, else_
        time.sleep(0.002)


def wait_until_it_accepts_no_more(gateway: Gateway) -> None:
    wait_until(lambda: not accepts(gateway), "it still accepts")


@contextlib.contextmanager
def streaming(gateway: Gateway, fake: FakeVllm) -> Iterator[tuple[Hold, httpx.Response]]:
    """A stream that has begun and goes on once the hold is released."""
    with gateway.client() as client, streaming_by(client, fake) as found:
        yield found


@contextlib.contextmanager
def streaming_by(client: httpx.Client, fake: FakeVllm) -> Iterator[tuple[Hold, httpx.Response]]:
    hold = Hold()
    fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
    with client.stream("POST", CHAT, json=STREAM) as answer:
        assert hold.reached.wait(10)
        yield hold, answer


def test_while_it_drains_it_says_so_and_still_answers(fake: FakeVllm) -> None:
    with running(fake.url, drain_delay=2.0) as gateway, gateway.client() as client:
        assert client.post(CHAT, json=WHOLE).headers.get("connection") is None
        gateway.signal()
        until = time.monotonic() + 1.5
        while (health := client.get("/v1/health_check")).status_code == 200:
            assert time.monotonic() < until
        assert health.json()["status"] == "draining"
        answer = client.post(CHAT, json=WHOLE)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert client.get("/health").headers["connection"] == "close"
        wait_until_it_accepts_no_more(gateway)


def test_a_stream_that_runs_ends_as_if_nothing_were(fake: FakeVllm) -> None:
    with running(fake.url, drain_timeout=20) as gateway, streaming(gateway, fake) as (hold, answer):
        gateway.signal()
        wait_until_it_accepts_no_more(gateway)
        hold.release()
        assert answer.read() == b"".join(EVENTS)


def test_a_stream_that_runs_for_too_long_gets_an_error_event(fake: FakeVllm) -> None:
    with running(fake.url, drain_timeout=0.5) as gateway, streaming(gateway, fake) as (hold, answer):
        gateway.signal()
        got = answer.read()
        hold.release()
        assert gateway.log(1)[0]["outcome"] == "drained"
    events = got.removeprefix(EVENTS[0])
    assert orjson.loads(events.partition(b"\n")[0].removeprefix(b"data: "))["error"]["code"] == "draining"
    assert events.endswith(DONE)


def test_an_idle_connection_gets_one_more_answer(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "DRAIN_GRACE", 20.0)  # a busy machine may take a second to ask
    with running(fake.url) as gateway, gateway.client() as client:
        client.post(CHAT, json=WHOLE)
        gateway.signal()
        wait_until_it_accepts_no_more(gateway)
        answer = client.post(CHAT, json=WHOLE)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        with pytest.raises(httpx.ConnectError):
            client.post(CHAT, json=WHOLE)


def test_a_connection_whose_answer_had_begun_gets_one_more_answer(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its head did not say that it closes, the client may have sent its next request."""
    monkeypatch.setattr(http_protocol, "ANSWERED_GRACE", 20.0)
    with running(fake.url, drain_timeout=20) as gateway, gateway.client() as client:
        with streaming_by(client, fake) as (hold, answer):
            gateway.signal()
            wait_until_it_accepts_no_more(gateway)
            hold.release()
            assert answer.read() == b"".join(EVENTS)
        more = client.post(CHAT, json=WHOLE)
        assert (more.status_code, more.headers["connection"]) == (200, "close")


def test_a_connection_whose_answer_had_begun_is_closed_soon(fake: FakeVllm) -> None:
    with running(fake.url, drain_timeout=20) as gateway, gateway.connect() as connection:
        hold, body = Hold(), orjson.dumps(STREAM)
        fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
        connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
        connection.sendall(body)
        assert hold.reached.wait(10)
        gateway.signal()
        wait_until_it_accepts_no_more(gateway)
        hold.release()
        with connection.makefile("rb") as answer:
            assert answer.read().endswith(b"0\r\n\r\n")


def test_an_idle_connection_is_closed_soon(fake: FakeVllm) -> None:
    with running(fake.url, drain_timeout=20) as gateway, gateway.connect() as connection:
        gateway.signal()
        assert connection.recv(1) == b""


def test_a_second_signal_ends_it_at_once(fake: FakeVllm) -> None:
    began = time.monotonic()
    with running(fake.url, drain_delay=60, drain_timeout=60) as gateway, streaming(gateway, fake) as (hold, answer):
        gateway.signal()
        gateway.signal()
        got = answer.read()
        hold.release()
        (line,) = gateway.log(1)
    assert time.monotonic() - began < 20
    assert got.startswith(EVENTS[0] + b'data: {"error"')
    assert got.endswith(DONE)
    assert (line["status"], line["outcome"]) == (200, "drained")


def test_a_head_that_has_not_come_whole_by_the_end_of_the_drain_gets_a_503(fake: FakeVllm) -> None:
    with running(fake.url, drain_timeout=1) as gateway, gateway.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nho")
        time.sleep(0.3)
        gateway.signal()
        began = time.monotonic()
        got = connection.recv(65536)
        assert time.monotonic() - began < 3
    assert got.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"draining"' in got


def test_who_has_connected_but_was_not_accepted_is_answered(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    body = orjson.dumps(WHOLE)
    call = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
    ends, connected = threading.Event(), threading.Event()
    on_tick = Server.on_tick

    async def until_they_have_connected(server: Server, counter: int) -> bool:
        if ending := await on_tick(server, counter):
            ends.set()
            connected.wait(10)
        return ending

    monkeypatch.setattr(Server, "on_tick", until_they_have_connected)
    with running(fake.url) as gateway, contextlib.ExitStack() as stack:
        gateway.signal()
        assert ends.wait(10)
        connections = [stack.enter_context(gateway.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(call)
        connected.set()
        assert {connection.recv(15) for connection in connections} == {b"HTTP/1.1 200 OK"}


def test_two_gateways_restarted_in_turn_lose_nothing(fake: FakeVllm) -> None:
    """As behind a balancer that asks the other once one takes no connection."""
    stop = threading.Event()
    statuses: list[int] = []
    gateways: list[Gateway] = []

    def ask() -> None:
        clients: dict[str, httpx.Client] = {}
        turn = 0
        while not stop.is_set():
            turn += 1
            for at in range(6):
                gateway = gateways[(turn + at) % 2]
                client = clients.setdefault(gateway.url, gateway.client())
                try:
                    statuses.append(client.post(CHAT, json=WHOLE).status_code)
                    break
                except httpx.ConnectError:
                    continue
            else:
                statuses.append(0)
        for client in clients.values():
            client.close()

    def twenty_more(so_far: int) -> None:
        wait_until(lambda: len(statuses) >= so_far + 20, "too few answers")

    with contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        running_now = [stack.enter_context(contextlib.ExitStack()) for _ in range(2)]
        gateways += [one.enter_context(running(fake.url)) for one in running_now]
        askers = [threading.Thread(target=ask) for _ in range(8)]
        for asker in askers:
            asker.start()
        for number in (0, 1, 0, 1):
            twenty_more(len(statuses))
            gateways[number].signal()
            running_now[number].close()
            gateways[number] = running_now[number].enter_context(running(fake.url))
        stop.set()
        for asker in askers:
            asker.join()
    assert set(statuses) == {200}

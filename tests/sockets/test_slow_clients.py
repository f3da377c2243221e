"""Clients that send or read too slowly, or not at all, are cut and hold nothing."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections import Counter

import httpx
import pytest

from gateway.app import create_app
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings
from gateway.server.http_protocol import HttpProtocol
from gateway.server.uvicorn_server import create_server
from tests.support import fake_vllm, gateway_process, load
from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk, response
from tests.support.gateway_process import running

pytestmark = pytest.mark.usefixtures("way")

CHAT = b"/v1/chat/completions"
WHOLE = b'{"model":"demo","messages":[{"role":"user","content":"Hi."}]}'
STREAM = WHOLE[:-1] + b',"stream":true}'
LARGE = fake_vllm.event({"content": "x" * 60_000})


def post(body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT, len(body), body)


def all_of(connection: socket.socket) -> bytes:
    got = b""
    while piece := connection.recv(1 << 16):
        got += piece
    return got


def test_a_connection_that_says_nothing_is_closed_without_a_word(fake: FakeVllm) -> None:
    with running(fake.url, header_timeout=0.5) as gateway, gateway.connect() as connection:
        assert all_of(connection) == b""


@pytest.mark.parametrize("before", [b"", post(WHOLE)])
def test_a_head_that_does_not_end_is_a_408(fake: FakeVllm, before: bytes) -> None:
    with running(fake.url, header_timeout=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(before + b"POST /v1/chat/completions HTTP/1.1\r\nho")
        got = all_of(connection)

    assert got.count(b"HTTP/1.1 200 OK") == (1 if before else 0)
    assert got.count(b"HTTP/1.1 408 ") == 1
    assert b'"code":"head_timeout"' in got
    assert b"GATEWAY_HEADER_TIMEOUT" in got


def test_a_head_that_does_not_end_never_cuts_the_answer_before_it(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, chunk(DONE), STREAM_END])
    with running(fake.url, header_timeout=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(post(STREAM))
        assert hold.reached.wait(10)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nho")
        time.sleep(2.5)  # longer than two looks at it
        hold.release()
        got = all_of(connection)

    answer, _, refusal = got.partition(STREAM_END)
    assert DONE in answer
    assert refusal.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_drips_is_a_408(fake: FakeVllm) -> None:
    with running(fake.url, header_timeout=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ")
        connection.settimeout(0.1)
        got = b""
        until = time.monotonic() + 10
        while b"408" not in got and time.monotonic() < until:
            connection.sendall(b"x")
            try:
                got += connection.recv(1 << 16)
            except TimeoutError:
                continue

    assert got.startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_a_body_that_was_refused_is_not_awaited_for_ever(fake: FakeVllm) -> None:
    with running(fake.url, header_timeout=0.5, max_body_bytes=2000) as gateway, gateway.connect() as connection:
        connection.sendall(post(b" " * 3000)[:200])
        got = all_of(connection)

    assert got.startswith(b"HTTP/1.1 413 ")


def test_an_idle_connection_that_has_asked_is_none_of_these(fake: FakeVllm) -> None:
    with running(fake.url, header_timeout=0.5) as gateway, gateway.connect() as connection:
        for _ in range(2):
            connection.sendall(post(WHOLE))
            got = b""
            while b'"usage"' not in got:
                got += connection.recv(1 << 16)
            time.sleep(1.7)  # longer than any look at it
        connection.sendall(post(WHOLE))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_a_client_that_reads_no_more_of_a_stream_is_cut(fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, *[chunk(LARGE)] * 800, chunk(DONE), STREAM_END])
    with running(fake.url, client_write_timeout=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(post(STREAM))
        request = fake.wait_for_request()
        assert request.closed.wait(20)
        outcome = gateway.log(1)[0]["outcome"]
        with pytest.raises(ConnectionResetError):
            all_of(connection)

    # An ASGI server tells an application only that the client has gone.
    assert outcome == ("timeout:client_write" if gateway_process.SHORTCUT else "client_left")


def test_a_client_that_reads_nothing_of_a_whole_answer_is_cut(fake: FakeVllm) -> None:
    fake.queue([response("200 OK", b" " * 30_000_000)])
    with running(fake.url, client_write_timeout=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(post(WHOLE))
        fake.wait_for_request()
        reset = select.poll()
        reset.register(connection, 0)
        assert reset.poll(20_000)
        with pytest.raises(ConnectionResetError):
            all_of(connection)
        with gateway.client() as client:
            assert "gateway_in_flight 0.0" in client.get("/metrics").text


def test_a_client_that_reads_slowly_gets_it_all(fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, *[chunk(LARGE)] * 150, chunk(DONE), STREAM_END])
    with running(fake.url, client_write_timeout=1.5) as gateway, gateway.connect() as connection:
        connection.sendall(post(STREAM))
        got = b""
        while not got.endswith(STREAM_END):
            got += connection.recv(1 << 18)
            time.sleep(0.1)

    assert got.count(LARGE.strip()) == 150


def test_a_client_that_reads_little_but_again_and_again_is_not_cut(fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, *[chunk(LARGE)] * 150, chunk(DONE), STREAM_END])
    with running(fake.url, client_write_timeout=1) as gateway, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((gateway.host, gateway.port))
        connection.sendall(post(STREAM))
        # Far less than the system has taken of it by then.
        until, got = time.monotonic() + 6, 0
        while time.monotonic() < until:
            got += len(connection.recv(2000))
            time.sleep(0.02)
        with gateway.client() as client:
            assert "gateway_in_flight 1.0" in client.get("/metrics").text
    assert 0 < got < 1_000_000


def test_clients_that_do_not_read_take_little_memory_and_slow_no_other(fake: FakeVllm) -> None:
    readers, shortcut = 30, "on" if gateway_process.SHORTCUT else "off"
    endless = [STREAM_HEAD, *[chunk(LARGE)] * 400]  # 24 MB each
    fake.queue(*[endless] * readers)
    with (
        load.gateway([fake.url], GATEWAY_SHORTCUT=shortcut) as (process, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        contextlib.ExitStack() as stack,
    ):
        client.get("/v1/health_check")
        before, _ = load.memory_and_descriptors(process.pid)
        for _ in range(readers):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(post(STREAM))
        fake.wait_for_request(readers)
        # Answered among them, and their memory is what it stays at.
        began = time.monotonic()
        for _ in range(50):
            assert client.post(CHAT.decode(), content=WHOLE).status_code == 200
        assert time.monotonic() - began < 5
        after, _ = load.memory_and_descriptors(process.pid)
        assert client.get("/metrics").text.count("gateway_in_flight 30.0") == 1
    # What two reads brought, and what is not written yet of them.
    assert (after - before) / readers < 1.5, "MB for each"


def test_each_connection_is_looked_at_once_in_ten_times_and_no_more_than_a_tenth_at_a_time() -> None:
    looks: list[tuple[int, HttpProtocol]] = []
    counter = 0

    class Looked(HttpProtocol):
        def check_timeouts(self, now: float) -> None:
            looks.append((counter, self))

    settings = Settings()
    app = create_app(settings, read_secrets(settings))
    server = create_server(settings, read_secrets(settings), app)
    server.config.load()

    async def look_again_and_again() -> list[HttpProtocol]:
        nonlocal counter
        loop = asyncio.get_running_loop()
        async with app.router.lifespan_context(app) as state:
            assert state is not None
            shared = dict(state)

            def accepted() -> HttpProtocol:
                return Looked(server.config, server._shared, shared)

            clients = [socket.socketpair() for _ in range(25)]
            connections = [(await loop.connect_accepted_socket(accepted, accepting))[1] for _, accepting in clients]
            for counter in range(20):
                if counter == 10:
                    # What has closed meanwhile is looked at no more, and not kept.
                    for connection in connections[5:]:
                        connection.transport.close()
                    await asyncio.sleep(0)
                    assert sum(map(len, server._shared.sweep_groups)) == 5
                server._check_connections(counter)
            for client, _ in clients:
                client.close()
        return connections

    connections = asyncio.run(look_again_and_again())

    seen = Counter(connection for _, connection in looks)
    assert seen == {connection: 2 if n < 5 else 1 for n, connection in enumerate(connections)}
    assert max(Counter(at for at, _ in looks).values()) == 3

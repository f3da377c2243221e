"""Heads as bytes: what is refused by them, on both ways in, with nothing sent upstream."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import orjson
import pytest

from tests.support.fake_vllm import FakeVllm, Hold, response
from tests.support.gateway_process import Gateway, running

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n"
BODY = b'{"model":"demo","messages":[]}'
LENGTH = b"content-length: %d\r\n" % len(BODY)
HOST = b"host: gateway\r\n"


@pytest.fixture
def gateway(fake: FakeVllm, way: None) -> Iterator[Gateway]:
    with running(fake.url, max_head_bytes=2048, max_headers=12, max_url_bytes=256) as started:
        yield started


def answers(gateway: Gateway, sent: bytes) -> bytes:
    """All that comes back until the connection closes, or the sender has nothing more to say."""
    with gateway.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while data := connection.recv(65536):
            got += data
        return got


def answered(connection: socket.socket) -> tuple[int, bytes]:
    """The status and body of one answer."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, file.read(length)


def status_of(gateway: Gateway, sent: bytes) -> tuple[int, str]:
    with gateway.connect() as connection:
        connection.sendall(sent)
        status, content = answered(connection)
    return status, orjson.loads(content)["error"]["message"] if status >= 400 else ""


REFUSED = [
    (b"", 400, "must name its Host once, but it names none"),
    (HOST + HOST, 400, "must name one Host, as HOST or HOST:PORT, but it is 'gateway,gateway'"),
    (b"host:\r\n", 400, "but it is ''"),
    (b"host: a b\r\n", 400, "but it is 'a b'"),
    (b"host: a/b\r\n", 400, "but it is 'a/b'"),
    (b"host: user@a\r\n", 400, "but it is 'user@a'"),
    (b"host: a:port\r\n", 400, "but it is 'a:port'"),
    (b"host: a:123456\r\n", 400, "but it is 'a:123456'"),
    (b"host: a\xff\r\n", 400, "but it is 'a\xff'"),
    (HOST + b"transfer-encoding: gzip, chunked\r\n", 400, "not an HTTP request"),
    (HOST + b"x: " + b"y" * 2100 + b"\r\n", 431, "at most 2048 bytes (GATEWAY_MAX_HEAD_BYTES)"),
    (HOST + b"".join(b"x-%d: y\r\n" % number for number in range(11)), 431, "at most 12 headers (GATEWAY_MAX_HEADERS)"),
]


@pytest.mark.parametrize(("headers", "status", "said"), REFUSED)
def test_a_head_is_refused_for_what_is_in_it(
    gateway: Gateway, fake: FakeVllm, headers: bytes, status: int, said: str
) -> None:
    for first in (CHAT, b"POST /v1/responses/resp_1/cancel HTTP/1.1\r\n", b"POST /nowhere HTTP/1.1\r\n"):
        got, message = status_of(gateway, first + headers + LENGTH + b"\r\n" + BODY)
        assert got == status, first
        assert said in message
    assert fake.received == []


@pytest.mark.parametrize(
    "host", [b"localhost:9000", b"llm_usvc:9000", b"[::1]:9000", b"gateway.example.", b"10.0.0.1", b"A-b.C~d"]
)
def test_any_name_that_a_machine_has_will_do(gateway: Gateway, fake: FakeVllm, host: bytes) -> None:
    assert status_of(gateway, CHAT + b"host: " + host + b"\r\n" + LENGTH + b"\r\n" + BODY)[0] == 200
    assert fake.received[0].header("host") == f"127.0.0.1:{fake.port}"


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/audio/transcriptions"])
def test_a_body_that_is_compressed_on_its_way_is_refused(gateway: Gateway, fake: FakeVllm, path: bytes) -> None:
    sent = b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    status, said = status_of(gateway, sent)
    assert (status, said) == (415, "Transfer-Encoding must be absent or chunked, but it is 'gzip, chunked'.")
    assert fake.received == []


def test_an_old_probe_need_not_name_a_host(gateway: Gateway) -> None:
    assert answers(gateway, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert answers(gateway, b"GET /health HTTP/1.0\r\nhost: a b\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_target_has_its_length(gateway: Gateway, fake: FakeVllm) -> None:
    assert status_of(gateway, b"GET /v1/models?" + b"a" * 230 + b" HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200
    for target in (b"/v1/models?" + b"a" * 250, b"/" + b"a" * 256):
        status, said = status_of(gateway, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (status, said) == (414, "The request's target must be at most 256 bytes (GATEWAY_MAX_URL_BYTES).")
    assert len(fake.received) == 1


@pytest.mark.parametrize("first", [CHAT + HOST + b"x: ", b"GET /", b"x"])
def test_a_head_that_does_not_end_is_not_kept(gateway: Gateway, first: bytes) -> None:
    with gateway.connect() as connection:
        connection.sendall(first)
        sent = 0
        try:
            while sent < 16 << 20:
                sent += connection.send(b"y" * 65536)
        except OSError:
            pass
    assert sent < 8 << 20
    with gateway.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/nowhere"])
@pytest.mark.parametrize(
    "endless", [b"1\r\n \r\n1;", b"1\r\n \r\n0\r\n", b"1\r\n \r\n0\r\nx: "], ids=["extension", "trailers", "trailer"]
)
def test_what_stands_around_a_body_without_end_is_not_kept(gateway: Gateway, path: bytes, endless: bytes) -> None:
    more = b"x: y\r\n" * 10_000 if endless.endswith(b"0\r\n") else b"y" * 60_000
    with gateway.connect() as connection:
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n" + endless)
        sent = 0
        try:
            while sent < 16 << 20:
                sent += connection.send(more)
        except OSError:
            pass
    assert sent < 8 << 20
    with gateway.client() as client:
        assert client.get("/health").status_code == 200


def test_heads_that_come_in_pieces_are_counted_one_by_one(gateway: Gateway) -> None:
    head = CHAT + HOST + b"x-filler: " + b"y" * 1200 + b"\r\n" + LENGTH + b"\r\n"
    with gateway.connect() as connection:
        for _ in range(5):
            for piece in (head[:400], head[400:800], head[800:] + BODY):
                connection.sendall(piece)
            assert answered(connection)[0] == 200


def test_a_head_that_is_too_large_behind_a_call_leaves_its_answer_alone(gateway: Gateway, fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([hold, response("200 OK", b"{}")])
    with gateway.connect() as connection:
        connection.sendall(CHAT + HOST + LENGTH + b"\r\n" + BODY)
        assert hold.reached.wait(10)
        connection.sendall(CHAT + HOST + b"x: ")
        for _ in range(20):
            connection.sendall(b"y" * 1024)
        hold.release()
        got = b""
        while b"HTTP/1.1 4" not in got:
            got += connection.recv(65536)
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")


def test_clients_own_words_are_shown_no_further_than_need_be(gateway: Gateway) -> None:
    status, said = status_of(gateway, CHAT + b"host: " + b"a b" * 300 + b"\r\n" + LENGTH + b"\r\n" + BODY)
    assert status == 400
    assert len(said) < 200


def test_behind_an_open_port_the_host_decides_nothing(gateway: Gateway, fake: FakeVllm) -> None:
    with gateway.client() as client:
        for host in ("127.0.0.1", "evil.example", "x"):
            assert client.get("/version/", headers={"host": host}).status_code == 404
            assert client.get("/version", headers={"host": host}).status_code == 200
    assert len(fake.received) == 3


OWN_NAMES = ("localhost", "localhost:9000", "LOCALHOST.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:9000", "10.1.2.3")
OTHER_NAMES = ("evil.example", "evil.example:9000", "localhost.evil.example", "127.0.0.1.evil.example", "xlocalhost")
CALLS = ((b"GET", b"/version"), (b"GET", b"/v1/models"), (b"GET", b"/"), (b"GET", b"/metrics"), (b"GET", b"/nowhere"))


def call(method: bytes, path: bytes, host: str) -> bytes:
    return b"%b %b HTTP/1.1\r\nhost: %b\r\ncontent-length: 0\r\n\r\n" % (method, path, host.encode())


@pytest.mark.usefixtures("way")
def test_on_a_loopback_address_without_keys_no_other_name_leads_to_it(fake: FakeVllm) -> None:
    chat = CHAT + b"host: %b\r\n" + LENGTH + b"\r\n" + BODY
    with running(fake.url, host="127.0.0.1") as gateway:
        for host in OTHER_NAMES:
            for method, path in CALLS:
                status, said = status_of(gateway, call(method, path, host))
                assert (status, "GATEWAY_ALLOWED_HOSTS" in said) == (421, True), (path, host)
            assert status_of(gateway, chat % host.encode())[0] == 421
        assert not fake.received
        with gateway.connect() as connection:  # the second is like the first but for its host
            for host, status in (("localhost", 200), ("evil.example", 421), ("localhost", 200)):
                connection.sendall(chat % host.encode())
                assert answered(connection)[0] == status
        for host in OWN_NAMES:
            assert status_of(gateway, call(b"GET", b"/version", host))[0] == 200, host
        assert status_of(gateway, b"GET /version HTTP/1.0\r\n\r\n")[0] == 200  # a browser always names one


@pytest.mark.usefixtures("way")
def test_probes_never_ask_for_the_host_and_tell_a_stranger_no_address(fake: FakeVllm) -> None:
    with running(fake.url, host="127.0.0.1") as gateway, gateway.connect() as connection:
        for path in (b"/health", b"/ping", b"/v1/health_check", b"/v1/health_check?model=demo"):
            connection.sendall(call(b"GET", path, "evil.example"))
            status, content = answered(connection)
            assert status == 200
            assert fake.url.encode() not in content
        connection.sendall(call(b"GET", b"/v1/health_check", "localhost"))
        assert fake.url.encode() in answered(connection)[1]


@pytest.mark.usefixtures("way")
def test_which_hosts_lead_to_it_may_be_said(fake: FakeVllm) -> None:
    secret = "sk-4f7d0c9a2b6e81d35a"
    with running(fake.url, host="127.0.0.1", allowed_hosts="gateway.example, b_2") as gateway:
        named = dict.fromkeys(("gateway.example", "Gateway.Example.:443", "b_2", "localhost"), 200)
        for host, status in {**named, "gatewayxexample": 421}.items():
            assert status_of(gateway, call(b"GET", b"/version", host))[0] == status, host
    with running(fake.url, host="127.0.0.1", api_keys=secret) as gateway, gateway.client() as client:
        client.headers["x-api-key"] = secret
        assert client.get("/version", headers={"host": "evil.example"}).status_code == 200
    with running(fake.url, allowed_hosts="gateway.example") as gateway:  # as behind a port that Docker publishes
        assert status_of(gateway, call(b"GET", b"/version", "evil.example"))[0] == 421


@pytest.mark.usefixtures("way")
def test_a_head_of_very_many_headers_is_refused_before_they_are_all_read(fake: FakeVllm) -> None:
    with running(fake.url) as gateway:
        for name in (b"a", b"authorization", b"x-%d"):
            lines = b"".join(name.replace(b"%d", b"%d" % number) + b":\r\n" for number in range(4000))
            with gateway.connect() as connection:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
                got = b""
                with contextlib.suppress(ConnectionResetError):  # the rest of the head is not read
                    while piece := connection.recv(65536):
                        got += piece
            assert got.startswith(b"HTTP/1.1 431 ")
            assert b"at most 100 headers (GATEWAY_MAX_HEADERS)" in got
    assert fake.received == []

"""A client leaves: on every route, in every form and at every stage its upstream stops, and nothing stays in flight."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from tests.support.fake_vllm import EVENTS, STREAM_HEAD, FakeVllm, Hold, Step, chunk, completion, response
from tests.support.gateway_process import Gateway

pytestmark = pytest.mark.usefixtures("way")

# Each as the start of its request, and its body.
CALLS = {
    "chat": (b"POST /v1/chat/completions", b'{"model":"demo","messages":[{"role":"user","content":"Hi."}]}'),
    "chat stream": (b"POST /v1/chat/completions", b'{"model":"demo","messages":[],"stream":true}'),
    "simplified": (b"POST /v1/chat/completions", b'{"messages":{"user":"Hi."},"streaming":false}'),
    "simplified stream": (b"POST /v1/chat/completions", b'{"messages":{"user":"Hi."}}'),
    "simplified repr": (b"POST /v1/chat/completions", b'{"messages":{"user":"Hi."},"stream_style":"repr"}'),
    "completion": (b"POST /v1/completions", b'{"model":"demo","prompt":"Hi."}'),
    "completion stream": (b"POST /v1/completions", b'{"model":"demo","prompt":"Hi.","stream":true}'),
    "models": (b"GET /v1/models", b""),
    "version": (b"GET /version", b""),
}
calls = pytest.mark.parametrize("call", CALLS)
# Of a machine that does other things, too; `make soak` measures the hundred milliseconds that are promised.
SOON = 0.5


def request(call: str) -> bytes:
    start, body = CALLS[call]
    return start + b" HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def assert_over(gateway: Gateway, status: int) -> None:
    (line,) = gateway.log(1)
    assert (line["outcome"], line["status"]) == ("client_left", status)
    with gateway.client() as client:
        gauges = [
            line
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("gateway_") and "in_flight" in line
        ]
    assert len(gauges) >= 2
    assert all(gauge.endswith(" 0.0") for gauge in gauges), gauges


@calls
def test_a_client_that_leaves_before_the_first_byte_closes_the_upstream(
    gateway: Gateway, fake: FakeVllm, call: str
) -> None:
    fake.queue([Hold()])
    with gateway.connect() as connection:
        connection.sendall(request(call))
        received = fake.wait_for_request()
        left = time.monotonic()
    assert received.closed.wait(5)
    assert time.monotonic() - left < SOON
    assert_over(gateway, 499)


@calls
def test_a_client_that_leaves_in_mid_answer_closes_the_upstream(gateway: Gateway, fake: FakeVllm, call: str) -> None:
    hold = Hold()
    streams, rewritten = "stream" in call or "repr" in call, call in ("simplified", "models")
    begun: list[Step] = [STREAM_HEAD, *map(chunk, EVENTS[:2])] if streams else [response("200 OK", completion())[:-10]]
    fake.queue([*begun, hold])
    with gateway.connect() as connection:
        connection.sendall(request(call))
        assert hold.reached.wait(5)
        if not rewritten:  # which begins once it is whole
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        received = fake.wait_for_request()
        left = time.monotonic()
    assert received.closed.wait(5)
    assert time.monotonic() - left < SOON
    assert_over(gateway, 499 if rewritten else 200)


@pytest.mark.parametrize("call", [call for call, (_, body) in CALLS.items() if body])
def test_a_client_that_leaves_in_its_upload_has_nothing_sent(gateway: Gateway, fake: FakeVllm, call: str) -> None:
    with gateway.connect() as connection:
        connection.sendall(request(call)[:-5])
        with gateway.client() as client:
            until = time.monotonic() + 5
            while "gateway_in_flight 1.0" not in client.get("/metrics").text:
                assert time.monotonic() < until, "it was never in flight"
    assert_over(gateway, 499)
    assert not fake.received


@pytest.mark.parametrize("how", ["closes", "resets"])
def test_a_client_that_leaves_with_a_second_request_behind_the_first_stops_the_first(
    gateway: Gateway, fake: FakeVllm, how: str
) -> None:
    fake.queue([Hold()])
    with gateway.connect() as connection:
        connection.sendall(request("chat") + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        received = fake.wait_for_request()
        if how == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert received.closed.wait(5)
    assert_over(gateway, 499)

"""Peers that are gone without a word, in two network namespaces with a link between them that is set down; needs root.

Not among the tests that `make test` finds; `make test-restarts` runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import orjson
import pytest

from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, Step, chunk
from tests.support.load import gateway

# linux/sched.h; os.setns came with Python 3.12.
_NETWORK = 0x40000000

NEAR, FAR = "192.0.2.1", "192.0.2.2"
CHAT = "/v1/chat/completions"
CALL = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
# Of the gateway, in seconds; its time limits are at least five times as long.
KEEPALIVE = 4
SETTINGS = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_TCP_KEEPALIVE": str(KEEPALIVE)}
# In which a peer must have been missed: the keepalive's time, one more probe of it, and a busy machine.
SOON = 15


@dataclass(frozen=True)
class Link:
    """Two network namespaces with a link between them: the gateway is at `near`, who vanishes at `far`."""

    near: str
    far: str

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This thread, and what it starts, is in that namespace."""
        with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{name}") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def set_down(self) -> None:
        """Whoever is at `far` has lost its power, as far as can be told at `near`."""
        _ip("-n", self.far, "link", "set", "there", "down")


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def link() -> Iterator[Link]:
    name = f"gateway-{os.getpid()}"
    made = Link(f"{name}-near", f"{name}-far")
    with contextlib.ExitStack() as undo:
        for namespace in (made.near, made.far):
            _ip("netns", "add", namespace)
            undo.callback(_ip, "netns", "del", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", made.near, "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", made.far)
        for namespace, device, address in ((made.near, "here", NEAR), (made.far, "there", FAR)):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", device)
            _ip("-n", namespace, "link", "set", device, "up")
        yield made


def call(port: int) -> socket.socket:
    """A client's connection to the gateway that has sent its call."""
    client = socket.create_connection((NEAR, port), timeout=30)
    body = orjson.dumps(CALL)
    client.sendall(
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (CHAT.encode(), len(body), body)
    )
    return client


def test_an_upstream_that_vanishes_in_mid_answer_is_missed(link: Link) -> None:
    hold = Hold()
    with contextlib.ExitStack() as stack:
        with link.inside(link.far):
            vllm = stack.enter_context(FakeVllm(host=FAR))
        vllm.queue([STREAM_HEAD, chunk(EVENTS[0]), chunk(EVENTS[1]), hold, chunk(DONE), STREAM_END])
        with link.inside(link.near):
            _, port = stack.enter_context(gateway([vllm.url], 0, **SETTINGS))
            with httpx.stream("POST", f"http://{NEAR}:{port}{CHAT}", json=CALL, timeout=30) as answer:
                assert hold.reached.wait(10)
                pieces = answer.iter_raw()
                content = next(pieces)
                link.set_down()
                began = time.monotonic()
                content += b"".join(pieces)
        assert time.monotonic() - began < SOON
        assert content.startswith(EVENTS[0])
        assert b'data: {"error"' in content
        assert content.endswith(DONE)


@pytest.mark.parametrize("events", [[], [chunk(EVENTS[1]), 0.1] * 400], ids=["in silence", "while it is written to"])
def test_a_client_that_vanishes_is_missed_and_its_generation_ends(link: Link, events: list[Step]) -> None:
    hold = Hold()
    with contextlib.ExitStack() as stack:
        with link.inside(link.near):
            vllm = stack.enter_context(FakeVllm())
            vllm.queue([STREAM_HEAD, *events, hold])
            limits = {"GATEWAY_CLIENT_WRITE_TIMEOUT": str(KEEPALIVE)}
            _, port = stack.enter_context(gateway([vllm.url], 0, **SETTINGS, **limits))
        with link.inside(link.far):
            stack.enter_context(call(port))
        request = vllm.wait_for_request()
        time.sleep(0.5)
        assert not request.closed.is_set()
        link.set_down()
        assert request.closed.wait(SOON)
        hold.release()


def test_a_client_that_is_there_and_reads_nothing_has_its_own_time(link: Link) -> None:
    """TCP_USER_TIMEOUT ends a peer whose window is closed, too, so it is the time that a client has to read."""
    large = b"data: " + b"x" * 60_000 + b"\n\n"
    with contextlib.ExitStack() as stack:
        with link.inside(link.near):
            vllm = stack.enter_context(FakeVllm())
            vllm.queue([STREAM_HEAD, *[chunk(large)] * 400, chunk(DONE), STREAM_END])
            _, port = stack.enter_context(gateway([vllm.url], 0, **SETTINGS))
        with link.inside(link.far):
            client = stack.enter_context(call(port))
        time.sleep(3 * KEEPALIVE)
        read = 0
        tail = b""
        while b"[DONE]" not in tail:
            piece = client.recv(1 << 20)
            assert piece, f"the connection ended after {read} bytes"
            read += len(piece)
            tail = tail[-20:] + piece[-40:]
        assert read > 400 * len(large)

"""How much Python runs for a relayed request and for an event, counted without a clock.

A change that adds half again is to be seen in review: then the numbers here are moved, and the commit says why.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvloop

from gateway.app import create_app
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings
from gateway.observability.logs import LineWriter
from gateway.pool.upstream_pool import UpstreamPool
from gateway.server.http_protocol import SharedState
from gateway.server.shortcut import Shortcut
from gateway.server.uvicorn_server import create_server
from gateway.upstream.connections import UpstreamConnection
from tests.support.fake_vllm import DONE, EVENTS, MODEL, STREAM_END, STREAM_HEAD, chunk, completion, response
from tests.support.sink import Sink

REQUEST, EVENT = 45, 5

WHOLE = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo"}'
STREAM = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo","stream":true}'


def post(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def calls_in(work: Callable[[], None]) -> int:
    """The Python functions that `work` enters."""
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


async def counted(*keys: str) -> tuple[int, float, int]:
    """Calls per request, calls per event, and objects that a hundred requests leave to the garbage collector.

    Where there are `keys` the requests bring none, and are refused.
    """
    settings = Settings(GATEWAY_UPSTREAMS=("http://127.0.0.1:9",), GATEWAY_PORT=0, GATEWAY_API_KEYS=keys)
    secrets = read_secrets(settings)
    log = LineWriter(os.open(os.devnull, os.O_WRONLY))
    app = create_app(settings, secrets, log)
    async with app.router.lifespan_context(app) as state:
        assert state is not None
        config = create_server(settings, secrets, app).config
        config.load()
        assert config.http_protocol_class is Shortcut
        loop = asyncio.get_running_loop()
        connection = Shortcut(config, SharedState(), dict(state), _loop=loop)
        client = Sink()
        connection.connection_made(client)
        pool: UpstreamPool = state["parts"].data_path.pool
        (upstream,) = pool
        upstream.models, upstream.state = (MODEL,), "serving"
        server = UpstreamConnection(state["parts"].data_path.transport, upstream)
        server.connection_made(Sink())
        server._owner.keep(server)
        answer = response("200 OK", completion())
        many = 100

        def whole() -> None:
            connection.data_received(post(WHOLE))
            server.data_received(answer)

        def streamed(events: int) -> None:
            connection.data_received(post(STREAM))
            server.data_received(STREAM_HEAD)
            for _ in range(events):
                server.data_received(chunk(EVENTS[1]))
            server.data_received(chunk(DONE) + STREAM_END)

        if keys:
            connection.data_received(post(WHOLE))
            refused = calls_in(lambda: connection.data_received(post(WHOLE)))
            assert client.written.startswith(b"HTTP/1.1 401 ")
            return refused, 0, 0
        whole()
        streamed(1)
        assert client.written.count(b"HTTP/1.1 200 OK") == 2
        request = calls_in(whole)
        event = (calls_in(lambda: streamed(many)) - calls_in(lambda: streamed(0))) / many
        gc.collect()
        # What was there before, the rest of a long test run, is not these requests' doing.
        gc.freeze()
        gc.disable()
        for _ in range(100):
            whole()
            streamed(3)
        garbage = gc.collect()
        gc.enable()
        gc.unfreeze()
    log.close()
    return request, event, garbage


def test_a_request_and_an_event_cost_no_more_calls_than_they_did() -> None:
    request, event, garbage = uvloop.run(counted())
    assert REQUEST / 1.5 < request <= REQUEST
    assert EVENT / 1.5 < event <= EVENT
    assert garbage < 100, "requests leave cycles behind"


def test_a_refusal_costs_less_than_a_service() -> None:
    refused, _, _ = uvloop.run(counted("sk-4f7d0c9a2b6e81d35a"))
    assert refused < REQUEST * 0.75

"""The whole gateway between two connections without sockets, which a test calls by hand to count what it does."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gateway.app import create_app
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings
from gateway.observability.logs import LineWriter
from gateway.pool.upstream_pool import UpstreamPool
from gateway.server.http_protocol import SharedState
from gateway.server.shortcut import Shortcut
from gateway.server.uvicorn_server import create_server
from gateway.upstream.connection import UpstreamConnection
from tests.support.fake_vllm import DONE, EVENTS, MODEL, STREAM_END, STREAM_HEAD, chunk
from tests.support.sink import Sink

WHOLE = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo"}'
SIMPLIFIED = b'{"messages":{"system":"Be brief.","user":"Hi"},"max_new_tokens":64,"temperature":0,"streaming":false}'
STREAM = b'{"messages":[{"role":"user","content":"Hi"}],"model":"demo","stream":true}'


def post(body: bytes, more: str = "") -> bytes:
    """A chat call as it comes in, with `more` lines in its head."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nContent-Type: application/json\r\n"
    return f"{head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Ends:
    """Both ends of a gateway, a client's connection and one to its only upstream, and what is written to each."""

    client: Shortcut
    to_client: Sink
    upstream: UpstreamConnection
    to_upstream: Sink

    def streamed(self, events: int, more: str = "") -> None:
        """A whole call that streams so many events, with `more` lines in its head."""
        self.begin_stream(more)
        for _ in range(events):
            self.upstream.data_received(chunk(EVENTS[1]))
        self.end_stream()

    def begin_stream(self, more: str = "") -> None:
        """A call whose stream has begun."""
        self.client.data_received(post(STREAM, more))
        self.upstream.data_received(STREAM_HEAD)

    def end_stream(self) -> None:
        """Its end."""
        self.upstream.data_received(chunk(DONE) + STREAM_END)


@asynccontextmanager
async def gateway_by_hand(**given: Any) -> AsyncIterator[Ends]:
    """A gateway with its log, by the settings that are `given`; uvloop must run."""
    own: dict[str, Any] = {"GATEWAY_UPSTREAMS": ("http://127.0.0.1:9",), "GATEWAY_PORT": 0}
    settings = Settings(**own, **given)
    secrets = read_secrets(settings)
    log = LineWriter(os.open(os.devnull, os.O_WRONLY))
    app = create_app(settings, secrets, log)
    async with app.router.lifespan_context(app) as state:
        assert state is not None
        config = create_server(settings, secrets, app).config
        config.load()
        assert config.http_protocol_class is Shortcut
        connection = Shortcut(config, SharedState(), dict(state), _loop=asyncio.get_running_loop())
        to_client, to_upstream = Sink(), Sink()
        connection.connection_made(to_client)
        pool: UpstreamPool = state["parts"].data_path.pool
        (upstream,) = pool
        upstream.models, upstream.state = (MODEL,), "serving"
        transport = state["parts"].data_path.transport
        server = UpstreamConnection(transport, upstream, "192.0.2.1", math.inf, 10**6)
        server.connection_made(to_upstream)
        transport.keep(server)
        yield Ends(connection, to_client, server, to_upstream)
    log.close()

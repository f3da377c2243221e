"""uvicorn's HTTP protocol, with time limits, a refusal in the gateway's own words, and an end in good order."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import select
import socket
import struct
import sys
import termios
from collections import deque
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.relay.data_path import DataPath
from gateway.server.context import Parts, state_of
from gateway.wire.errors import BadRequest, Draining, GatewayError, HeadTimeout, HeadTooLarge
from gateway.wire.heads import lines, new_request_id, too_large

_log = logging.getLogger(__name__)

_NO_HTTP = BadRequest("What came is not an HTTP request: the connection is closed.")

# What is used here of a class that promises nothing to those that inherit from it.
_METHODS = (
    "connection_lost",
    "connection_made",
    "data_received",
    "on_body",
    "on_headers_complete",
    "on_message_begin",
    "on_message_complete",
    "on_response_complete",
    "_start_asgi_task",
    "_unset_keepalive_if_required",
    "_unsupported_upgrade_warning",
    "pause_writing",
    "resume_writing",
    "send_400_response",
    "shutdown",
    "timeout_keep_alive_handler",
)
_ATTRIBUTES = (
    "app_state",
    "cycle",
    "expect_100_continue",
    "flow",
    "headers",
    "parser",
    "pipeline",
    "server_state",
    "timeout_keep_alive",
    "timeout_keep_alive_task",
    "transport",
)


def missing_names(protocol: type[asyncio.Protocol]) -> list[str]:
    """The names that we need of uvicorn's protocol and that the installed one lacks."""
    attributes = protocol.__init__.__code__.co_names
    methods = [name for name in _METHODS if not hasattr(protocol, name)]
    return methods + [name for name in _ATTRIBUTES if name not in attributes]


# Once no more is accepted, a connection may get one more request for so many seconds: its client does not know yet.
DRAIN_GRACE = 1.0

# Linux tells of a FIN behind unread bytes; a reset is told of everywhere, whatever is asked.
_LEFT = getattr(select, "POLLRDHUP", 0)

# A path with its query; before it, for a proxy, a host that decides nothing. No fragment, which nobody sends.
_TARGET = re.compile(rb"(?:https?://[A-Za-z0-9._~:\[\]-]+)?(/[^#]*)", re.IGNORECASE)
# Of any other target; uvicorn reads it, and no route has it.
_NO_PATH = b"*"

# struct linger: on, for no time.
_AT_ONCE = struct.pack("ii", 1, 0)


def _unsent_by_the_system(connection: socket.socket) -> int:
    """Bytes that were written and that the other side has not taken; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 0  # it has just been closed


# In the place of a deque for each connection, of which hardly any pipelines.
_NOTHING_WAITS: deque[Any] = deque(maxlen=0)


class _Flow(FlowControl):
    """uvicorn's, without an event for each connection, which takes as much memory as the exchange."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._writable: asyncio.Event | None = None

    async def drain(self) -> None:
        if self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
            self._writable = None


class _ClosedParser:
    """The parser of a connection that was refused."""

    @staticmethod
    def feed_data(data: bytes) -> None: ...


class SharedState(ServerState):
    """uvicorn's, with what its connections share beyond that."""

    def __init__(self) -> None:
        super().__init__()
        # The headers that every answer has as they are written; they are made anew once a second.
        self.default_lines = b""
        # The connections once more, in ten parts that are looked at in turn.
        self.sweep_groups: list[set[HttpProtocol]] = [set() for _ in range(10)]


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's own, but what is no HTTP is refused in OpenAI's envelope, and never in the middle of an answer."""

    server_state: SharedState
    cycle: Any  # uvicorn's RequestResponseCycle, or, where the shortcut is taken, the protocol itself

    # uvicorn's own attributes just fit in what its instances share; a slot more is 8 bytes, one past that 1,500.
    __slots__ = (
        "_awaited_since",
        "_has_all",
        "_head_size",
        "_idle_since",
        "_in_body",
        "_in_head",
        "_refused",
        "_running",
        "_stuck_since",
        "_sweep_group",
        "_unsent",
    )

    def __init__(
        self,
        config: Config,
        server_state: SharedState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.pipeline = _NOTHING_WAITS
        self._in_body = False
        self._refused = False
        self._idle_since: float | None = None
        # The application's running request; uvicorn knows only the newest, which may wait behind it.
        self._running: RequestResponseCycle | None = None
        # Since when more is to come of the client: a request's head, or the rest of a body that was refused.
        self._awaited_since: float | None = None
        self._in_head = False
        self._head_size = 0
        self._unsent = 0
        self._stuck_since = 0.0
        self._has_all = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.flow = _Flow(self.transport)
        self._awaited_since = self.loop.time()
        self._sweep_group = min(self.server_state.sweep_groups, key=len)
        self._sweep_group.add(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if (self._in_head or self._in_body) and not self._refused:
            # A head that does not end is not kept without end, nor what is no body in the midst of one: trailers, and
            # what stands behind a chunk's size. What came with its beginning may be of a body before it.
            self._head_size = 0 if self._head_size < 0 else self._head_size + len(data)
            if self._head_size > self._path.head_limits.max_head_bytes:
                self._in_head = False
                self._stop(HeadTooLarge(too_large(self._path.head_limits)))

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_size = -1
        self._awaited_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_size = -1
        self._awaited_since = None
        self._in_body = True
        target = self.url
        self.url = self._readable(target)
        if self.pipeline is _NOTHING_WAITS and self.cycle is not None and not self.cycle.response_complete:
            self.pipeline = deque()
        super().on_headers_complete()
        self.headers = []  # the parser goes on to fill the scope's own list, with trailers
        if self.url is _NO_PATH:
            self.scope["path"] = target[:1000].decode("latin-1")
        if self._path.drain.began or self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def _readable(self, target: bytes) -> bytes:
        """The path and query of a target, so that uvicorn, which would break off, can read them."""
        found = _TARGET.fullmatch(target)
        # What is longer than may be is told so by what is left of it; uvicorn reads 65,535 bytes.
        return found[1][: self._path.head_limits.max_url_bytes + 2] if found else _NO_PATH

    def on_body(self, body: bytes) -> None:
        self._head_size = -1
        super().on_body(body)

    def _unsupported_upgrade_warning(self) -> None:
        """The parser takes a request to change the protocol for its end: what comes now is its body, or is none.

        So nothing more is read, and its answer closes the connection.
        """
        self.parser = cast(Any, _ClosedParser)

    def on_message_complete(self) -> None:
        self._ends_message()
        super().on_message_complete()

    def _ends_message(self) -> None:
        """The request is complete. Its trailers, too, may have made it the last that the parser reads."""
        self._in_body = False
        self._awaited_since = None
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the refusal and for one keep-alive timer a connection, not one a request."""
        self.server_state.total_requests += 1
        self._running = None
        if self.transport.is_closing():
            return
        if self._in_body:
            self._awaited_since = self.loop.time()
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refused:
            self._refuse(_NO_HTTP)
        else:
            self._idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._arm(self.timeout_keep_alive)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        state_of(cycle.scope)["leaving"] = []
        super()._start_asgi_task(cycle, app)

    def _arm(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is not None:
            left = self._idle_since + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self._arm(left)
            else:
                self.transport.close()

    @property
    def _path(self) -> DataPath:
        parts: Parts = self.app_state["parts"]
        return parts.data_path

    def check_timeouts(self, now: float) -> None:
        """Enforce the client-side timeouts; called about once a second per connection, with the loop's time.

        For all connections at once, as a timer for each would cost more than all of this.
        """
        limits = self._path.limits
        answered = self.cycle is None or self.cycle.response_complete  # an answer is not cut for what comes after it
        if answered and self._awaited_since is not None and now - self._awaited_since >= limits.header_timeout:
            if self._in_head:
                self._refuse(
                    HeadTimeout(f"No whole head came within {limits.header_timeout:g} s (GATEWAY_HEADER_TIMEOUT).")
                )
            else:
                self.transport.close()
        elif answered and self._in_head and self._path.time() >= self._path.drain.ends_at:
            self._refuse(Draining("The gateway ends, and the time for what was still coming is over: try again."))
        unsent, closing = self.transport.get_write_buffer_size(), self.transport.is_closing()
        if unsent or closing:
            # And what the system holds: it takes more of ours only once a third of that is gone.
            unsent += _unsent_by_the_system(self.transport.get_extra_info("socket"))
        if unsent and unsent >= self._unsent > 0:
            if now - self._stuck_since >= limits.client_write_timeout:
                self._stuck()
        else:
            self._stuck_since = now
        self._unsent = unsent
        # In TLS it would be awaited for long that the client says that it closes, too, which many never do. Seen twice,
        # as what is on its way to the system is seen nowhere.
        has_all = closing and not unsent
        if has_all and self._has_all:
            self.transport.abort()
        self._has_all = has_all
        if self.flow.read_paused and self._has_left():
            self.transport.abort()

    def _has_left(self) -> bool:
        """Whether the client has, which is not read while it is not read from: a second request waits behind one."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), _LEFT)
        return bool(poll.poll(0))

    def _stuck(self) -> None:
        """The client reads nothing of what was written to it."""
        # Reset: else the system keeps for minutes what it, too, could not send.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()

    def shutdown(self) -> None:
        """No more is accepted: one that is idle may still get one request, whose answer closes it."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(DRAIN_GRACE, self._close_if_idle)
        else:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if not self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
            for call in state_of(self._running.scope)["leaving"]:
                call()
        self._sweep_group.discard(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came; answers that are owed to requests before it go first."""
        self._stop(_NO_HTTP)

    def _stop(self, error: GatewayError) -> None:
        self._refused = True
        self.parser = cast(Any, _ClosedParser)
        if not self._in_body:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(error)
        elif self.pipeline:
            self.pipeline.popleft()  # the newest, which is broken in its body
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(error)

    def _refuse(self, error: GatewayError) -> None:
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        content = error.envelope(request_id)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        self.transport.write(STATUS_LINE[error.status] + lines(headers) + b"\r\n" + content)
        self.transport.close()
        parts: Parts = self.app_state["parts"]
        parts.metrics.other("unknown", error.status)
        parts.request_log.other(request_id, "-", "-", error.status, 0.0)

    def cut(self) -> None:
        """The time to end in good order is over."""
        self.transport.abort()

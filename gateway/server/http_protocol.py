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
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.admission.arrivals import no_room
from gateway.admission.buffers import SHARE
from gateway.admission.owners import Owner
from gateway.admission.turns import BULK, BulkReads, FewAtATime
from gateway.relay.data_path import DataPath
from gateway.server.context import Parts, state_of
from gateway.server.listener import WATCHERS
from gateway.wire.client_address import is_trusted
from gateway.wire.errors import BadRequest, Draining, GatewayError, HeadTimeout, HeadTooLarge, Shortage
from gateway.wire.heads import lines, new_request_id, too_large, too_many

_log = logging.getLogger(__name__)

_NO_HTTP: GatewayError = BadRequest("What came is not an HTTP request: the connection is closed.")

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
# Longer where its last answer has just ended: most clients send their next request then, and on a busy machine a second
# is too short for some of them.
ANSWERED_GRACE = 3.0

# So many bytes may wait for a client until its answer does.
_UNSENT = 16 * 1024
# What may be many chunks is read in slices of so many bytes, one after the other for so many seconds: to read a chunk
# takes as long as to read a thousand bytes.
_SLICE, _SLICE_TIME = 4096, 0.0005

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
        self.held_up = False
        self._writable: asyncio.Event | None = None

    def hold_up(self) -> None:
        """Read nothing, whatever uvicorn makes of it, until `read_on`."""
        self.held_up = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def read_on(self) -> None:
        self.held_up = False
        if not self.read_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self.held_up:
            self.read_paused = False
        else:
            super().resume_reading()

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


class TooManyHeaders(Exception):
    """Ends the parser's work on a head."""


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
        self.bulk_reads = BulkReads(lambda call: asyncio.get_running_loop().call_soon(call))
        self.few = FewAtATime(lambda call: asyncio.get_running_loop().call_soon(call))


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's own, but what is no HTTP is refused in OpenAI's envelope, and never in the middle of an answer."""

    server_state: SharedState
    flow: _Flow
    cycle: Any  # uvicorn's RequestResponseCycle, or, where the shortcut is taken, the protocol itself

    # uvicorn's own attributes just fit in what its instances share; a slot more is 8 bytes, one past that 1,500.
    __slots__ = (
        "_awaited_since",
        "_ends",
        "_feeds_rest",
        "_first_read",
        "_has_all",
        "_head_size",
        "_held",
        "_held_for",
        "_idle_since",
        "_in_body",
        "_in_head",
        "_refusal",
        "_rest",
        "_running",
        "_stuck_since",
        "_sweep_group",
        "_unsent",
        "address",
        "owner",
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
        # Why no more is read, once that is so.
        self._refusal: GatewayError | None = None
        self._ends = False
        self._idle_since: float | None = None
        # The application's running request; uvicorn knows only the newest, which may wait behind it.
        self._running: RequestResponseCycle | None = None
        # Since when more is to come of the client: a request's head, or the rest of a body that was refused.
        self._awaited_since: float | None = None
        self._in_head = False
        # Of what came with the head's beginning, and after that.
        self._first_read = 0
        self._head_size = 0
        self._unsent = 0
        self._stuck_since = 0.0
        self._has_all = False
        # What has come and waits for its turn, and whether a part of it has that.
        self._rest = b""
        self._feeds_rest = False
        # What this connection holds itself, in bytes, and whose it is.
        self._held = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.address = self.client[0] if self.client else ""
        self.owner = self._held_for = self._path.owners.of(self.address)
        self.flow = _Flow(self.transport)
        # What waits for the client is counted once this is passed: of thousands, all that is not would be much.
        # It goes on once all of it is sent, lest thousands that are read again go on in one turn.
        self.transport.set_write_buffer_limits(high=_UNSENT, low=0)
        self._awaited_since = self.loop.time()
        self._sweep_group = min(self.server_state.sweep_groups, key=len)
        self._sweep_group.add(self)
        self.owner.connections += 1
        self._refusal = self._one_too_many()
        if self._refusal is not None:
            self._in_head = False
            self.parser = cast(Any, _ClosedParser)
            self._refuse(self._refusal)

    def _one_too_many(self) -> Shortage | None:
        """Why this connection may not be; who has most of them leaves some to others, as of what is held."""
        path = self._path
        most, others = path.limits.max_connections, len(self.server_state.connections) - 1
        if others >= most + self._kept:
            return Shortage(f"{most} clients are connected, and no more may be (GATEWAY_MAX_CONNECTIONS).")
        own = self.owner.connections - 1
        if own < SHARE * (most - others) or self._kept or is_trusted(self.address, path.proxies):
            return None
        return Shortage(
            f"{own} of at most {most} connections (GATEWAY_MAX_CONNECTIONS) are of this address, and the rest is for "
            "others: close some of them."
        )

    @property
    def _kept(self) -> int:
        """How many more may be connected on this port, as a gateway that is full is not to be taken for a dead one."""
        parts: Parts = self.app_state["parts"]
        return WATCHERS if self.server and self.server[1] in (parts.health_port, parts.metrics_port) else 0

    def data_received(self, data: bytes) -> None:
        if self._rest and not self._feeds_rest:
            self._rest += data
            return
        if len(data) <= _SLICE:
            self._parse(data)
            if self._feeds_rest:
                return  # what was read is looked at when all of it is fed
        elif not self._feed(data):
            return
        self._look_at_size(len(data))

    def _parse(self, data: bytes) -> None:
        """As uvicorn's `data_received`, but for a request to change the protocol, which is read for what else it is."""
        self._idle_since = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        except httptools.HttpParserUpgrade as offer:
            self._read_without_offer(data[offer.args[0] :])

    def _read_without_offer(self, rest: bytes) -> None:
        """Read a head once more without its offer of another protocol, and the `rest`, of which its body is a part.

        RFC 9110, 7.8: such an offer may be ignored, and java.net.http makes one with each request that is not in TLS.
        httptools tells llhttp that no body follows a head with one, so that a new parser gets the head, which says now
        that the connection closes: what stands behind the body may be of the other protocol already, and is not read.
        A CONNECT is nothing without its tunnel: what follows it is not HTTP.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        self.parser = cast(Any, _ClosedParser)
        if method == b"CONNECT":
            return
        named = [token.strip() for name, value in self.headers if name == b"connection" for token in value.split(b",")]
        named = [token for token in named if token.lower() not in (b"", b"upgrade", b"keep-alive")]
        headers = [header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        headers.append((b"connection", b",".join([*named, b"close"])))
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, lines(headers))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's: it passes over the rest
        self._parse(head + rest)

    def hold_up(self) -> None:
        """Others bring as much, and each has its turn."""
        self.flow.hold_up()

    def read_on(self) -> None:
        """It is this connection's turn again."""
        if not self._rest:
            self.flow.read_on()

    def _feed(self, data: bytes) -> bool:
        """Have the parser read so much: a body in chunks, which may be many, in slices, which wait for their turn.

        Whether it has read all.
        """
        began, at = self._path.time(), 0
        while at < len(data):
            size = len(data) if self._has_length() else _SLICE
            if at and size == _SLICE and self._path.time() - began >= _SLICE_TIME:
                self._rest = data[at:]
                self.flow.hold_up()
                self._path.work.add(self._whose(), self._feed_in_steps(at))
                if not self._hold():
                    self._stop(no_room(self._path.buffers))
                return False
            self._parse(data[at : at + size])
            at += size
        return True

    def _has_length(self) -> bool:
        """Whether what comes is a body that says how long it is."""
        return self._in_body and any(name == b"content-length" for name, _ in self.scope["headers"])

    def _feed_in_steps(self, before: int) -> Iterator[None]:
        """The rest of a read, of which so much is fed already."""
        at = 0
        while at < len(self._rest) and self._refusal is None and not self.transport.is_closing():
            self._feeds_rest = True
            try:
                self.data_received(self._rest[at : at + _SLICE])
            except Exception:
                _log.exception("a connection failed")
                self.transport.abort()
            self._feeds_rest = False
            at += _SLICE
            yield
        size, self._rest = before + len(self._rest), b""
        if not self.transport.is_closing():
            self.read_on()
            self._look_at_size(size)

    def _look_at_size(self, size: int) -> None:
        """So much has come, of a head or of a body."""
        if self._in_body and size >= BULK and not self.flow.read_paused:
            if self.cycle.response_complete:
                self.server_state.bulk_reads.has_read_for_nothing(self)
            else:
                self.server_state.bulk_reads.has_read(self)
        if (self._in_head or self._in_body) and self._refusal is None:
            # A head that does not end is not kept without end, nor what is no body in the midst of one: trailers, and
            # what stands behind a chunk's size. What came with its beginning may be of a body before it.
            if self._head_size < 0:
                self._first_read, self._head_size = size, 0
            else:
                self._head_size += size
            if self._head_size > self._path.head_limits.max_head_bytes:
                self._in_head = False
                self._stop(HeadTooLarge(too_large(self._path.head_limits)))
            elif not self._hold():
                self._stop(no_room(self._path.buffers))
        elif self.pipeline and not self._hold():
            self._forget_pipelined(no_room(self._path.buffers))

    def _forget_pipelined(self, error: GatewayError) -> None:
        """Requests that wait behind the running one are answered with this, once, and the connection is closed."""
        for cycle, _ in self.pipeline:
            cycle.body = bytearray()
        self.pipeline.clear()
        self._stop(error)
        self._hold()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_size = -1
        self._awaited_since = self.loop.time()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, but what is far too many is the end of a head, and of trailers nothing.

        A few more are counted and refused with all else that an answer needs, as are those of other origins' pages.
        """
        if len(self.headers) > 2 * self.app_state["parts"].data_path.head_limits.max_headers:
            if self._in_head:
                raise TooManyHeaders
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the head comes once more
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1: it knows none
        self._in_head = False
        self._head_size = -1
        self._awaited_since = None
        self._in_body = True
        if self._held:
            self._hold()
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

    def on_message_complete(self) -> None:
        if self._in_head:
            return  # of a head that comes once more
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
        elif self._refusal is not None:
            self._refuse(self._refusal)
        else:
            self._idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._arm(self.timeout_keep_alive)
            if self._ends:
                self.shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        state_of(cycle.scope)["leaving"] = []
        if cycle.scope["http_version"] == "1.0" and cycle.scope["method"] != "HEAD":
            app = self._without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _without_chunks(self, app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
        """`app` for a client of HTTP/1.0, which knows no chunks: an answer without a length ends with the connection.

        RFC 9112, 6.1 and 6.3. uvicorn frames every answer by its length or in chunks, so that each piece is a length to
        it. An answer that breaks off ends in a reset, as it would look whole otherwise.
        """

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            ends_with_connection = False

            async def send_plain(message: Message) -> None:
                nonlocal ends_with_connection
                if message["type"] == "http.response.start":
                    if not any(name == b"content-length" for name, _ in message["headers"]):
                        ends_with_connection, cycle.chunked_encoding = True, False
                elif ends_with_connection:
                    cycle.expected_content_length = len(message.get("body", b""))
                await send(message)

            try:
                await app(scope, receive, send_plain)
            finally:
                if ends_with_connection and not cycle.response_complete and not self.transport.is_closing():
                    self._reset()

        return answer

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
        if self._held:
            self._hold()
        unsent, closing = self.transport.get_write_buffer_size(), self.transport.is_closing()
        if unsent or closing:
            # And what the system holds: it takes more of ours only once a third of that is gone.
            unsent += _unsent_by_the_system(self.transport.get_extra_info("socket"))
        if unsent and unsent >= self._unsent > 0:
            if now - self._stuck_since >= limits.client_write_timeout:
                self._cut("timeout:client_write")
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

    def _cut(self, outcome: str) -> None:
        """The client reads nothing of what was written to it, or too little for what there is room for."""
        self._let_go()
        self._reset()  # else the system keeps for minutes what it, too, could not send

    def _reset(self) -> None:
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._hold():
            self._cut("shortage")

    def resume_writing(self) -> None:
        self.server_state.few.add(self._resume)

    def _resume(self) -> None:
        """The client takes more."""
        if self.transport.get_write_buffer_size() <= _UNSENT:  # else it was paused anew, and is resumed again
            super().resume_writing()
            self._hold()

    def _hold(self) -> bool:
        """Count what waits here for the client to take it, or for the rest of a head, or behind a running request.

        Whether there is room for it.
        """
        size = len(self._rest)
        if self.flow.write_paused:
            size += self.transport.get_write_buffer_size()
        if self._in_head:
            size += self._first_read + max(0, self._head_size)
        for cycle, _ in self.pipeline:
            size += len(cycle.body)
        buffers, held = self._path.buffers, self._held
        if held:
            buffers.hold(self._held_for, -held)
        self._held = size
        self._held_for = self._whose()
        return buffers.hold(self._held_for, size) if size else True

    def _let_go(self) -> None:
        self._path.buffers.hold(self._held_for, -self._held)
        self._held = 0

    def _whose(self) -> Owner:
        """Who answers for what is held here."""
        return self.owner

    def shutdown(self) -> None:
        """No more is accepted: one that is idle may still get one request, whose answer closes it.

        So may one whose answer has begun, once that is complete: its head did not say that the connection closes, and
        the client's next request may be on its way by then.
        """
        grace, self._ends = ANSWERED_GRACE if self._ends else DRAIN_GRACE, True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(grace, self._close_if_idle)
        elif not self.cycle.response_started:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if not self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._sweep_group.discard(self)
        self.server_state.few.add(partial(self._lost, exc))

    def _lost(self, exc: Exception | None) -> None:
        """The connection is lost."""
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
            for call in state_of(self._running.scope)["leaving"]:
                call()
        self._let_go()
        self.owner.connections -= 1
        self._rest = b""
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came; answers that are owed to requests before it go first."""
        error = sys.exception()
        fault = _NO_HTTP
        if error is not None and isinstance(error.__context__, TooManyHeaders):
            fault = HeadTooLarge(too_many(self._path.head_limits))
        self._stop(fault)

    def _stop(self, error: GatewayError) -> None:
        self._refusal = error
        self.parser = cast(Any, _ClosedParser)
        if self._rest:
            # Nobody will read it, and until its turn came it would be held against all.
            self._rest = b""
            self._hold()
        if not self._in_body:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(error)
        elif self.pipeline:
            cycle, _ = self.pipeline.popleft()  # the newest, which is broken in its body
            cycle.body = bytearray()
            self._hold()
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
            *(header for header in error.answer_headers if header[0] != b"connection"),
            (b"connection", b"close"),
        ]
        self.transport.write(STATUS_LINE[error.status] + lines(headers) + b"\r\n" + content)
        self.transport.close()
        parts: Parts = self.app_state["parts"]
        parts.metrics.requests.other("unknown", error.status)
        parts.request_log.other(request_id, "-", "-", self.address, error.status, 0.0)

    def cut(self) -> None:
        """The time to end in good order is over."""
        self.transport.abort()

"""The transport in whatever order a network, its callers and time bring about, with httpx's own engine as the oracle.

No socket and no clock: connections are written to and read from by hand, and time passes when a rule says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any, cast

import httpcore
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.pool.upstream_pool import Upstream
from gateway.relay.interfaces import Connection
from gateway.upstream.connection import UpstreamConnection
from gateway.upstream.connections import IDLE_FOR, ConnectionLimits, ConnectionPool
from gateway.upstream.resolver import Resolver
from tests.upstream.test_connections import ANSWERS, LIMITS, REQUEST, Answer, Caller, well_formed

# Without those that a parser may end sooner or later than another.
ONE_ANSWER = [
    answer for name, answer in ANSWERS.items() if name not in ("an obsolete line end after", "upgrade offered")
]


def by_httpcore(sent: bytes) -> tuple[int, bytes, bool]:
    """Status, body and whether the connection can be used again, as httpx's engine has it after that and an end."""
    origin = httpcore.Origin(b"http", b"upstream", 80)
    with httpcore.HTTP11Connection(origin=origin, stream=httpcore.MockStream([sent])) as connection:
        response = connection.request("GET", "http://upstream/v1/models")
        return response.status, response.content, connection.is_idle()


class Wire(asyncio.Transport):
    """One connection, by hand: what is said while it is paused is heard when it is resumed."""

    def __init__(self, loop: Loop, protocol: UpstreamConnection) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = b""
        self.gone = False
        self._loop = loop
        self._paused = False
        self._unread: list[bytes] = []
        self._ending: list[Exception | None] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.gone
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        assert name == "socket"
        return self

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """A socket's, as which it stands in."""

    def is_closing(self) -> bool:
        return self.gone

    def abort(self) -> None:
        if not self.gone:
            self.gone = True
            self._loop.call_soon(self.protocol.connection_lost, None)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        self._loop.call_soon(self._go_on)

    def says(self, data: bytes) -> None:
        self._unread.append(data)
        self._go_on()

    def ends(self, error: Exception | None) -> None:
        self._ending.append(error)
        self._go_on()

    def _go_on(self) -> None:
        while self._unread and not self._paused and not self.gone:
            self.protocol.data_received(self._unread.pop(0))
        if self._ending and not self._unread and not self._paused and not self.gone:
            self.gone = True
            self.protocol.connection_lost(self._ending[0])


class Loop(asyncio.SelectorEventLoop):
    """Its time passes by hand, its connections are wires."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.wires: list[Wire] = []
        self.refuses = False

    def time(self) -> float:
        return self.now

    def turn(self) -> None:
        """All that is due."""
        for _ in range(6):
            self.call_soon(self.stop)
            self.run_forever()


class Pool(ConnectionPool):
    """Its connections are wires."""

    async def _open(self, upstream: Upstream) -> UpstreamConnection:
        loop = self._loop
        assert isinstance(loop, Loop)
        if loop.refuses:
            raise ConnectionRefusedError
        wire = Wire(loop, UpstreamConnection(self, upstream, "192.0.2.1", math.inf, 10**6))
        loop.wires.append(wire)
        wire.protocol.connection_made(wire)
        return wire.protocol


class Pausing(Caller):
    """Pauses in the midst of its answer, as one does whose own client reads slowly."""

    def upstream_body(self, data: bytes) -> None:
        super().upstream_body(data)
        assert self.connection is not None
        self.connection.pause()


class Call:
    """One caller, what it gets and how much of that has been sent."""

    def __init__(self, caller: Caller, answer: Answer) -> None:
        self.caller = caller
        self.answer = answer
        self.sent = 0
        self.wire: Wire | None = None
        # How the upstream has gone, which is not heard while it is paused.
        self.reset: bool | None = None

    @property
    def connection(self) -> Connection:
        """Lent to it."""
        assert self.caller.connection is not None
        return self.caller.connection


class Life(RuleBasedStateMachine):
    """One pool and one upstream."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.pool: ConnectionPool = self.loop.run_until_complete(self._made())
        self.upstream = Upstream.from_url("http://upstream")
        # As the pool should have them, the oldest first: when each was put by.
        self.idle: dict[Wire, float] = {}
        self.calls: list[Call] = []

    async def _made(self) -> ConnectionPool:
        return Pool(ConnectionLimits(**LIMITS | {"connect_timeout": 5}), Resolver())

    def teardown(self) -> None:
        self.loop.run_until_complete(self.pool.close())
        self.loop.turn()
        assert all(wire.gone for wire in self.idle)
        self.loop.close()

    @rule(
        fresh=st.booleans(), answer=well_formed() | st.sampled_from(ONE_ANSWER), kind=st.sampled_from([Caller, Pausing])
    )
    def call(self, fresh: bool, answer: Answer, kind: type[Caller] = Caller) -> None:
        call = Call(kind(), answer)
        known = len(self.loop.wires)
        self.pool.connect(self.upstream, call.caller, fresh=fresh)
        self.loop.turn()
        connection = cast(UpstreamConnection, call.caller.connection)
        if fresh or not self.idle:
            assert len(self.loop.wires) == known + 1
            call.wire = self.loop.wires[-1]
        else:
            # The youngest.
            assert len(self.loop.wires) == known
            call.wire, _ = self.idle.popitem()
        assert connection is call.wire.protocol
        assert connection.reused == (len(self.loop.wires) == known)
        call.wire.written = b""
        connection.send(REQUEST)
        assert call.wire.written == REQUEST
        self.calls.append(call)

    @rule(fresh=st.booleans(), answer=well_formed() | st.sampled_from(ONE_ANSWER), reset=st.booleans())
    def call_and_be_answered(self, fresh: bool, answer: Answer, reset: bool) -> None:
        self.call(fresh, answer)
        call = self.calls[-1]
        self._comes(call, len(answer.sent))
        if answer.closes:
            self._goes(call, reset)
            assert call not in self.calls

    @rule()
    def call_one_that_refuses(self) -> None:
        self.loop.refuses = True
        caller = Caller()
        self.pool.connect(self.upstream, caller, fresh=True)
        self.loop.turn()
        self.loop.refuses = False
        assert caller.ended.startswith("unreachable")

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), part=st.floats(0, 1))
    def a_piece_comes(self, data: st.DataObject, part: float) -> None:
        call = self._one(data)
        left = len(call.answer.sent) - call.sent
        self._comes(call, max(1, int(left * part)))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def the_rest_comes(self, data: st.DataObject) -> None:
        call = self._one(data)
        self._comes(call, len(call.answer.sent))

    def _one(self, data: st.DataObject) -> Call:
        return data.draw(st.sampled_from(self.calls))

    def _comes(self, call: Call, size: int) -> None:
        piece = call.answer.sent[call.sent : call.sent + size]
        if call.reset is not None or not piece:
            return
        assert call.wire is not None
        call.sent += len(piece)
        call.wire.says(piece)
        self._look_at(call)

    def _look_at(self, call: Call) -> None:
        self.loop.turn()
        assert call.wire is not None
        caller, answer = call.caller, call.answer
        if not caller.ended:
            return
        self.calls.remove(call)
        if caller.ended == "end":
            # An answer without a length ends where its connection does, so whatever had come by then is the whole.
            status, body, again = by_httpcore(answer.sent[: call.sent])
            assert (caller.status, caller.body) == (status, body)
            assert call.reset is False if answer.closes else call.sent == len(answer.sent)
            # HTTP/1.0 that says it keeps the connection does so, though httpx does not rely on it.
            again = again or b"connection: keep-alive" in answer.sent
            if again and call.reset is None:
                assert not call.wire.gone
                self.idle[call.wire] = self.loop.now
            elif not again:
                assert call.wire.gone
        else:
            assert caller.ended.startswith("lost")
            assert call.reset is not None
            assert caller.answered == bool(call.sent)
            assert answer.body.startswith(caller.body)
            assert call.wire.gone

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def the_caller_pauses(self, data: st.DataObject) -> None:
        self._one(data).connection.pause()

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def the_caller_goes_on(self, data: st.DataObject) -> None:
        call = self._one(data)
        call.connection.resume()
        self._look_at(call)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def the_caller_leaves(self, data: st.DataObject) -> None:
        call = self._one(data)
        self.calls.remove(call)
        told = call.caller.ended, call.caller.body
        call.connection.discard()
        assert call.wire is not None
        assert call.wire.gone
        self.loop.turn()
        assert (call.caller.ended, call.caller.body) == told

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), reset=st.booleans())
    def the_upstream_goes(self, data: st.DataObject, reset: bool) -> None:
        self._goes(self._one(data), reset)

    def _goes(self, call: Call, reset: bool) -> None:
        if call.reset is not None:
            return
        assert call.wire is not None
        call.reset = reset
        call.wire.ends(ConnectionResetError() if reset else None)
        self._look_at(call)

    @precondition(lambda self: self.idle)
    @rule(data=st.data(), how=st.sampled_from(["speaks", "closes", "resets"]))
    def an_idle_one_does_what_nobody_asked_for(self, data: st.DataObject, how: str) -> None:
        wire = data.draw(st.sampled_from(list(self.idle)))
        del self.idle[wire]
        if how == "speaks":
            wire.says(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        else:
            wire.ends(ConnectionResetError() if how == "resets" else None)
        self.loop.turn()
        assert wire.gone

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, IDLE_FOR - 0.5, IDLE_FOR]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now += seconds
        self.loop.turn()
        for wire, since in list(self.idle.items()):
            if self.loop.now - since >= IDLE_FOR:
                assert wire.gone
                del self.idle[wire]

    @invariant()
    def those_and_only_those_are_idle(self) -> None:
        assert self._kept() == list(self.idle)
        assert not any(wire.gone for wire in self.idle)

    def _kept(self) -> list[Wire]:
        kept: Iterable[UpstreamConnection] = self.pool._idle.get(self.upstream, ())
        return [next(wire for wire in self.loop.wires if wire.protocol is connection) for connection in kept]


TestLife = Life.TestCase

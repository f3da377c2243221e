"""Streams as a load: opens them, checks each to its end, and times every event.

Run as a process of its own, told by a JSON list of `Plan`s, which it follows at the same time; tells by a list, in
which a plan that went wrong has the words for it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop

from bench.mock import TURN
from bench.processes import cpu_us, rss_kb

# The streams of a plan that has turns begin within so many seconds.
RAMP = 0.3
# A gateway that has been at rest finds its code out of the caches: this much of its turn tells nothing.
_WAKING = 0.02

# Of <asm-generic/socket.h>, which Python's socket does not name.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")

_STAMP = re.compile(rb'"content": ?"(\d{6,})"')


@dataclass
class Plan:
    """`streams` streams of `events` events.

    `begin` is when they begin and `turns` when each of their turns to speak does, all by the monotonic clock: they are
    measured in these alone, and in full where there are none.
    `hold` only opens the streams, waits for each one's first event and reads the memory of `pid` then.
    `stands_still` has the process group of `pid` stopped between its turns.
    `leave` leaves each stream once it has an event, or, with a `delay`, before it has any.
    """

    port: int
    pid: int
    body: str
    streams: int
    events: int
    begin: float = 0
    turns: list[float] = field(default_factory=list)
    stands_still: bool = False
    hold: bool = False
    leave: float | None = None


class Stream:
    """One stream from its request to its end.

    An event's arrival is when the kernel put it into our socket: this process reads it when it gets the core that it
    shares with the upstream, and that wait is no gateway's.
    """

    def __init__(self, load: Load, connected: socket.socket) -> None:
        self._load = load
        self._socket = connected
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self.events = 0
        loop = asyncio.get_running_loop()
        self.done = loop.create_future()
        self.first = loop.create_future()
        self.started = time.time_ns()
        connected.sendall(load.request)
        loop.add_reader(connected, self._read)

    def leave(self) -> None:
        """Close the connection, whatever is still to come."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        try:
            data, control, _, _ = self._socket.recvmsg(16384, 64)
        except OSError as error:
            self._lost(error)
            return
        if not data:
            self._lost(None)
            return
        if control:
            seconds, nanoseconds = _TIMESPEC.unpack(control[0][2])
            now = seconds * 1_000_000_000 + nanoseconds
        else:  # the kernel begins to tell a moment after it was first asked to
            now = time.time_ns()
        load = self._load
        self._parser.feed_data(data)
        data = self._rest
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            return
        self._rest = data[end:]
        stamps = _STAMP.findall(data, 0, end)
        if stamps and not self.events:
            load.first_tokens.append(now - self.started)
            self.first.set_result(None)
        self.events += len(stamps)
        load.events += len(stamps)
        if load.measures:
            load.delays[-1] += [now - int(stamp) for stamp in stamps]
        if b"data: [DONE]" in data and not self.done.done():
            if self.events == load.plan.events:
                self.done.set_result(None)
            else:
                self._fail(f"{self.events} of {load.plan.events} events")

    def on_body(self, data: bytes) -> None:
        self._rest += data

    def _lost(self, error: OSError | None) -> None:
        self.leave()
        self._fail(f"cut after {self.events} of {self._load.plan.events} events ({error})")

    def _fail(self, why: str) -> None:
        for waited in (self.first, self.done):
            if not waited.done():
                waited.set_exception(RuntimeError(why))
                waited.exception()  # told to whoever waits; to nobody else


class Load:
    """All streams of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.measures = not plan.turns
        self.events = 0
        self.delays: list[list[int]] = [] if plan.turns else [[]]
        self.first_tokens: list[int] = []
        body = plan.body.encode()
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async def _open(self, count: int, over: float) -> list[Stream]:
        loop = asyncio.get_running_loop()
        streams = []
        begun = loop.time()
        for number in range(count):
            # Evenly, so that not all of them speak at once.
            await asyncio.sleep(max(0, begun + over * number / count - loop.time()))
            connected = socket.socket()
            connected.setblocking(False)
            connected.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            await loop.sock_connect(connected, ("127.0.0.1", self.plan.port))
            streams.append(Stream(self, connected))
        return streams

    async def run(self) -> dict[str, list[float]]:
        """What was measured in each turn, or once: times in milliseconds, CPU in microseconds, memory in KB."""
        plan = self.plan
        if plan.leave is not None:
            return {"left": await self._leave(plan.leave)}
        if plan.hold:
            before = rss_kb(plan.pid)
            streams = await self._open(plan.streams, 0)
            await asyncio.wait_for(asyncio.gather(*(stream.first for stream in streams)), 60)
            return {"kb_per_stream": [(rss_kb(plan.pid) - before) / plan.streams]}
        await _until(plan.begin)
        begun, cpu = time.monotonic(), -cpu_us(plan.pid)
        streams = await self._open(plan.streams, RAMP if plan.turns else 0)
        per_event = await self._in_turns()
        await asyncio.wait_for(asyncio.gather(*(stream.done for stream in streams)), 60)
        seconds = time.monotonic() - begun
        if not plan.turns:
            per_event = [(cpu + cpu_us(plan.pid)) / self.events]
        return {
            "cpu_us_per_event": per_event,
            "events_per_s": [self.events / seconds],
            "delay_p50_ms": [_percentile(turn, 0.5) for turn in self.delays],
            "delay_p99_ms": [_percentile(turn, 0.99) for turn in self.delays],
            "first_token_p50_ms": [_percentile(self.first_tokens, 0.5)],
            "first_token_p99_ms": [_percentile(self.first_tokens, 0.99)],
        }

    async def _in_turns(self) -> list[float]:
        """The CPU that an event took in each turn, in microseconds."""
        per_event = []
        for turn in self.plan.turns:
            await _until(turn)
            if self.plan.stands_still:
                os.killpg(self.plan.pid, signal.SIGCONT)
            # What was late in the last turn has come by now.
            self.measures = False
            await _until(turn + _WAKING)
            events, cpu = self.events, cpu_us(self.plan.pid)
            self.measures = True
            self.delays.append([])
            await _until(turn + TURN + 0.002)
            came = self.events - events
            per_event.append((cpu_us(self.plan.pid) - cpu) / came if came else 0)
            if self.plan.stands_still and turn != self.plan.turns[-1]:
                os.killpg(self.plan.pid, signal.SIGSTOP)
        return per_event

    async def _leave(self, after: float) -> list[float]:
        """When each stream was left, one after the other."""
        left: list[float] = []
        for _ in range(self.plan.streams):
            (stream,) = await self._open(1, 0)
            if after:
                await asyncio.sleep(after)
            else:
                await stream.first
            left.append(time.monotonic_ns())
            stream.leave()
            await asyncio.sleep(0.15)
        return left


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0, moment - time.monotonic()))


async def _all(plans: list[Plan]) -> list[dict[str, Any]]:
    done = await asyncio.gather(*(Load(plan).run() for plan in plans), return_exceptions=True)
    return [{"failed": repr(one)} if isinstance(one, BaseException) else one for one in done]


def _percentile(nanoseconds: list[int], part: float) -> float:
    """Milliseconds. Of a turn in which nothing came, as long as it was."""
    return sorted(nanoseconds)[int(len(nanoseconds) * part)] / 1e6 if nanoseconds else TURN * 1000


if __name__ == "__main__":
    # It lives for seconds, and a collection would be measured as a delay.
    gc.disable()
    json.dump(uvloop.run(_all([Plan(**one) for one in json.loads(sys.argv[1])])), sys.stdout)

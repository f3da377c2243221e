"""Requests as bytes, spoilt at random, on both ways in; ends with a count of what was refused, what passed, what broke.

`python -m tests.heavy.fuzz --seconds 60`. All on loopback, in one process; the seed is printed and can be given again,
and `--case` to see one alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import click
import uvloop

from gateway.observability.logs import LineWriter
from tests.support.smuggling.cases import CASES
from tests.support.smuggling.grammar import BODY, request
from tests.support.smuggling.lanes import LAST, Seen, Way, answers

# Cases that run at once, each with a gateway and an upstream of its own on each way in, so that what goes upstream is
# known to be of that case. Real sockets, all on one loop, as that makes some 600 cases a second on a slow core, and
# 350,000 in ten minutes: enough not to do without what a connection's end or a write in pieces may bring about.
LANES = 8
# A call that must have its answer follows so many cases.
BATCH = 100
# Nothing more comes then; and, where the two ways differ, if only because the machine was slow.
QUIET, SURELY = 0.05, 1.0
# What waits for its limit, as an unread header does, tells nothing and takes long.
LONGEST = 8192

# A head that comes again is known again, and not parsed.
_CALL = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 15\r\n\r\n" + BODY

Spoil = Callable[[random.Random, bytearray], None]

_WORDS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x0b", b":", b",", b";", b"\r\n ", b"\r\n\r\n", b"\xff", b"%", b"#"),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: other\r\n", b"Connection: close\r\n"),
    *(b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n"),
    *(
        b"0\r\n\r\n",
        b"f\r\n",
        b"GET /version HTTP/1.1\r\nHost: gateway\r\n\r\n",
        b"/sleep",
        b"HTTP/1.0",
        b"HTTP/1.1",
        b"0x",
    ),
    *(b"GET ", b"POST ", b"CONNECT ", b"-", b"+", b"99999999999999999999", b'"', b"\\", b"chunked", b"../", b"%2e%2e/"),
]


def _span(chance: random.Random, data: bytearray) -> slice:
    at = chance.randrange(len(data) + 1)
    return slice(at, at + chance.choice((1, 1, 2, 4, 16, 64)))


def _flip(chance: random.Random, data: bytearray) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _insert(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.choice(_WORDS)


def _replace(chance: random.Random, data: bytearray) -> None:
    data[_span(chance, data)] = chance.choice(_WORDS)


def _drop(chance: random.Random, data: bytearray) -> None:
    del data[_span(chance, data)]


def _repeat(chance: random.Random, data: bytearray) -> None:
    span = _span(chance, data)
    data[span.start : span.start] = data[span]


def _move(chance: random.Random, data: bytearray) -> None:
    span = _span(chance, data)
    taken = data[span]
    del data[span]
    at = chance.randrange(len(data) + 1)
    data[at:at] = taken


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _repeat_line(chance: random.Random, data: bytearray) -> None:
    lines = bytes(data).split(b"\r\n")
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(lines))
    data[:] = b"\r\n".join(lines)


_SPOILS: list[Spoil] = [
    _flip,
    _flip,
    _insert,
    _insert,
    _replace,
    _drop,
    _repeat,
    _move,
    _repeat_line,
    _repeat_line,
    _cut,
]
_WRITTEN = [sent for case in CASES if len(sent := b"".join(case.writes)) <= LONGEST]
# As most that is spoilt goes nowhere.
_PASSED = [sent for case in CASES if case.upstream and len(sent := b"".join(case.writes)) <= LONGEST]


def made(seed: int, number: int) -> tuple[bytes, list[bytes]]:
    """A case: a call that is answered before it, if any, and its writes."""
    chance = random.Random(f"{seed} {number}")

    def base() -> bytes:
        kind = chance.random()
        return request(chance.choice) if kind < 0.4 else chance.choice(_PASSED if kind < 0.8 else _WRITTEN)

    first = _CALL if chance.random() < 0.3 else b""
    data = bytearray(first if chance.random() < 0.7 and first else base())
    if chance.random() < 0.2:
        data += base()
    if chance.random() < 0.1:
        other = base()
        data[chance.randrange(len(data) + 1) :] = other[chance.randrange(len(other) + 1) :]
    for _ in range(chance.choice((0, 1, 1, 1, 1, 2, 2, 4))):
        chance.choice(_SPOILS)(chance, data)
    data = data[:LONGEST]
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 0, 1, 3))))
    return first, [bytes(data[start:stop]) for start, stop in itertools.pairwise([0, *cuts, len(data)])]


def _told(seen: Seen) -> object:
    """What must be alike on both ways, to the byte, but for the refusal that a connection ends with.

    Where a read brings a head that is refused and a body that is broken, the shortcut has said the one before it sees
    the other.
    """
    found = answers(seen.back)
    if seen.closed and found and 400 <= found[-1][0] < 500:
        _, head, body = found[-1]
        return Seen(seen.back[: -len(head + body) - 4], True, seen.got).told, "refused"
    return seen.told


class _Errors(logging.Handler):
    """What the gateways tell of themselves as a failure."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(self.format(record))


class Fuzz:
    """The gateways, their upstreams, and what was found."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._numbers = itertools.count(1)
        self._errors = _Errors()
        self.count: Counter[str] = Counter()
        self.stopping = False

    def run(self, seconds: float, only: int | None) -> None:
        """Until the time is over; in a thread that is not the first, where servers leave signals alone."""
        logging.basicConfig(level=logging.ERROR, handlers=[self._errors], force=True)
        read, write = os.pipe()
        reader = threading.Thread(target=self._read_log, args=(read,))
        reader.start()
        log = LineWriter(write)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._play(seconds, only, log))
        finally:
            log.close()
            os.close(write)
            reader.join()

    async def _play(self, seconds: float, only: int | None, log: LineWriter) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self._errors.told.append(repr(context)))
        until = time.monotonic() + seconds
        lanes = [asyncio.create_task(self._lane(until, only, log)) for _ in range(1 if only else LANES)]
        while not all(lane.done() for lane in lanes):
            done, _ = await asyncio.wait(lanes, timeout=5)
            left = max(0.0, until - time.monotonic())
            if not done:
                click.echo(f"{left:4.0f} s left, {self.count['tried']} cases", err=True)
        for lane in lanes:
            lane.result()

    async def _lane(self, until: float, only: int | None, log: LineWriter) -> None:
        async with Way(True, log).running() as shortcut, Way(False, log).running() as app:
            while not self.stopping and time.monotonic() < until:
                number = only or next(self._numbers)
                await self._case(number, shortcut, app, show=only is not None)
                if only or number % BATCH == 0:
                    await self._canaries(shortcut, app)
                if only:
                    break
            await self._canaries(shortcut, app)

    async def _case(self, number: int, shortcut: Way, app: Way, *, show: bool) -> None:
        first, writes = made(self._seed, number)
        writes.append(LAST)
        self.count["tried"] += 1
        try:
            seen = await self._both(shortcut, app, first, writes, QUIET)
            if _told(seen[0]) != _told(seen[1]):
                self.count["tried again, for more time"] += 1
                seen = await self._both(shortcut, app, first, writes, SURELY)
            wrong = self._wrong(seen, [first, *writes])
        except AssertionError as error:
            wrong = [str(error)]
        for way in (shortcut, app):
            wrong += way.upstream.faults
            way.upstream.faults.clear()
        wrong += self._errors.told
        self._errors.told.clear()
        if show:
            for one in seen:
                click.echo(repr((one.back, one.closed, [got.asked for got in one.got])))
        if wrong:
            self.count["crashes and faults"] += 1
            click.echo(f"case {number} of seed {self._seed}: {first!r} {writes!r}\n  " + "\n  ".join(wrong), err=True)
        elif len(seen[0].got) > bool(first):
            self.count["passed"] += 1
            self.count["requests that reached an upstream"] += len(seen[0].got) - bool(first)
        elif any(400 <= status < 500 for status in seen[0].statuses):
            self.count["refused"] += 1
        else:
            self.count["not for an upstream, or not whole"] += 1

    async def _both(
        self, shortcut: Way, app: Way, first: bytes, writes: list[bytes], quiet: float
    ) -> tuple[Seen, Seen]:
        return await asyncio.gather(
            shortcut.ask(*writes, quiet=quiet, between=0, first=first),
            app.ask(*writes, quiet=quiet, between=0, first=first),
        )

    def _wrong(self, seen: tuple[Seen, Seen], writes: list[bytes]) -> list[str]:
        wrong = []
        if _told(seen[0]) != _told(seen[1]):
            wrong.append(f"the ways differ: {seen[0].told!r}, {seen[1].told!r}")
        if any(status >= 500 for one in seen for status in one.statuses):
            wrong.append(f"it fails: {seen[0].back!r}")
        if len(seen[0].got) >= b"".join(writes).count(b"/1."):  # of RTSP's and ICE's lines, too, as the parser has it
            wrong.append(f"more requests than were sent: {[got.asked for got in seen[0].got]}")
        return wrong

    async def _canaries(self, *ways: Way) -> None:
        for way in ways:
            call = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
            seen = await way.ask(call)
            if seen.statuses != (200,) or b"/v1/completions" not in answers(seen.back)[0][2]:
                self.count["crashes and faults"] += 1
                click.echo(f"a call is not answered ({way.name}): {seen.back!r}", err=True)

    def _read_log(self, pipe: int) -> None:
        """Each line is one, whatever clients have sent."""
        with os.fdopen(pipe, "rb") as file:
            for line in file:
                try:
                    assert "request_id" in json.loads(line)
                except (ValueError, AssertionError):
                    self.count["crashes and faults"] += 1
                    click.echo(f"no line of a log: {line!r}", err=True)


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long it lasts.")
@click.option("--seed", type=int, default=lambda: random.randrange(1 << 30), help="To see the same again.")
@click.option("--case", "only", type=int, help="Play this case alone, and show what comes of it.")
def main(seconds: float, seed: int, only: int | None) -> None:
    """Send spoilt requests to gateways on both ways in, and count what became of them."""
    for name in list(os.environ):
        if name.startswith(("GATEWAY_", "LLM_", "OPEA_")):
            del os.environ[name]
    click.echo(f"seed {seed}", err=True)
    fuzz = Fuzz(seed)
    began = time.monotonic()
    thread = threading.Thread(target=fuzz.run, args=(seconds, only))
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        fuzz.stopping = True
        thread.join()
    count = fuzz.count
    for name in ("tried", "refused", "passed", "not for an upstream, or not whole", "tried again, for more time"):
        click.echo(f"{name:40} {count[name]:8}")
    click.echo(f"{'requests that reached an upstream':40} {count['requests that reached an upstream']:8}")
    click.echo(f"{'crashes and faults':40} {count['crashes and faults']:8}")
    click.echo(f"{'cases a second':40} {count['tried'] / (time.monotonic() - began):8.0f}")
    click.echo(f"{'seed':40} {seed:8}")
    sys.exit(1 if count["crashes and faults"] or not count["tried"] else 0)


if __name__ == "__main__":
    main()

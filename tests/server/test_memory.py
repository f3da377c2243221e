"""The memory of many requests at once goes back to the system when they are over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvloop

from gateway.server import memory
from gateway.server.memory import MemoryTrimmer
from tests.support import load
from tests.support.fake_vllm import EVENTS, STREAM_HEAD, FakeVllm, Hold, chunk
from tests.support.gateway_process import running

# Observations in a row, twenty seconds of them, by whose end all has been given back.
OVER = [0] * 200

CALL = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 58\r\n\r\n"
    b'{"messages":[{"role":"user","content":"x"}],"stream":true}'
)


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that memory is given back."""
    seen: list[None] = []
    monkeypatch.setattr(memory, "_trim", lambda: seen.append(None))
    return seen


def observe(*in_flight: int) -> None:
    """As a gateway that has so many requests in flight, one after the other."""

    async def tell() -> None:
        trimmer = MemoryTrimmer()
        for count in in_flight:
            trimmer.observe(count)
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(tell())


def resident() -> float:
    """What this process has in memory, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that keeps what is free")
def test_what_a_burst_has_left_goes_back_to_the_system() -> None:
    class Left:
        def __init__(self) -> None:
            self.itself = self  # only a collection finds it
            self.pieces = [bytearray(2000) for _ in range(25_000)]

    gc.disable()
    try:
        Left()
        in_use = bytearray(100_000)  # behind them, so that they are not at the heap's end
        before = resident()
        observe(2000, *OVER)
        assert before - resident() > 40
        del in_use
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "in_flight",
    [
        pytest.param([2000] * 200, id="all of them run"),
        pytest.param([2000, *[600] * 200], id="a third of them runs"),
        pytest.param([2000, *[0, 600] * 100], id="new ones come again and again"),
        pytest.param([31, *OVER], id="they were few"),
        pytest.param(OVER, id="there were none"),
    ],
)
def test_nothing_is_done_while_many_run_or_when_few_did(in_flight: list[int], trims: list[None]) -> None:
    observe(*in_flight)
    assert not trims


def test_new_ones_postpone_it(trims: list[None]) -> None:
    trimmer = MemoryTrimmer()
    trimmer.observe(2000)
    quiet = 0
    while not trims:
        trimmer.observe(0)
        quiet += 1
    trims.clear()
    for _ in range(10):
        for count in [2000, *[0] * (quiet - 1)]:
            trimmer.observe(count)
    assert not trims
    trimmer.observe(0)
    assert trims


def test_what_ran_on_below_a_burst_is_given_back_when_it_ends(trims: list[None]) -> None:
    trimmer = MemoryTrimmer()
    for count in [2000, *[300] * 200]:
        trimmer.observe(count)
    assert trims
    trims.clear()
    for count in OVER:
        trimmer.observe(count)
    assert trims


def test_once_given_back_it_is_left_alone(trims: list[None]) -> None:
    trimmer = MemoryTrimmer()
    for count in [2000, *OVER]:
        trimmer.observe(count)
    trims.clear()
    for count in OVER * 5:
        trimmer.observe(count)
    assert not trims


def test_a_gateway_gives_back_what_many_calls_took_once_they_are_over(fake: FakeVllm, trims: list[None]) -> None:
    for _ in range(40):
        fake.queue([STREAM_HEAD, chunk(EVENTS[0]), Hold()])
    with running(fake.url) as gateway:
        with contextlib.ExitStack() as clients:
            for _ in range(40):
                clients.enter_context(gateway.connect()).sendall(CALL)
            fake.wait(lambda: len(fake.received) == 40)
            time.sleep(0.3)
            assert not trims
        until = time.monotonic() + 10
        while not trims:
            assert time.monotonic() < until, "it never gives back"
            time.sleep(0.01)


def test_names_that_the_types_have_been_asked_for_are_let_go() -> None:
    name = "".join(["asked", " ", "for"])  # made here, and no constant
    held = sys.getrefcount(name)
    assert not hasattr(Path, name)
    observe(2000, *OVER)
    assert sys.getrefcount(name) == held


def at_once(loop: asyncio.AbstractEventLoop) -> asyncio.Handle:
    return loop.call_soon(id, None)


def later(loop: asyncio.AbstractEventLoop) -> asyncio.Handle:
    return loop.call_later(0.001, id, None)  # 0 were at once


@pytest.mark.parametrize("call", [at_once, later])
def test_new_handles_are_kept_in_the_place_of_old_ones(
    call: Callable[[asyncio.AbstractEventLoop], asyncio.Handle],
) -> None:
    async def kept() -> tuple[set[int], set[int]]:
        loop = asyncio.get_running_loop()
        old = {id(handle) for handle in [call(loop) for _ in range(250)]}
        await asyncio.sleep(0.01)
        trimmer = MemoryTrimmer()
        for count in (2000, *OVER):
            trimmer.observe(count)
        await asyncio.sleep(0.01)
        return old, {id(handle) for handle in [call(loop) for _ in range(250)]}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        old, new = runner.run(kept())
    assert len(old & new) < 25


def test_threads_take_their_memory_from_the_one_heap_that_is_given_back(fake: FakeVllm) -> None:
    # Its first lines were written by a thread of the log's own.
    with load.gateway([fake.url]) as (process, port):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        time.sleep(0.3)
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    # glibc sets 64 MiB aside for each other heap, of which it opens as much as is used. A stack's guard is one page.
    aside = [re.match(r"([0-9a-f]+)-([0-9a-f]+[048c]000000) ---p ", line) for line in maps]
    assert not [one.string for one in aside if one and int(one[2], 16) - int(one[1], 16) > 1024 * 1024]


def test_a_server_loads_nothing_that_it_never_uses() -> None:
    code = (
        "import contextlib, sys; from gateway.__main__ import main; sys.argv[1:] = ['--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "assert 'gateway.app' in sys.modules\n"
        "commands = {name for name in sys.modules if name.startswith('gateway.commands.')}\n"
        "assert commands == {'gateway.commands.serve'}, commands\n"
        "sys.exit('rich' in sys.modules or 'pygments' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0

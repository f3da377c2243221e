"""The memory of many requests at once goes back to the system when they are over."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from gateway.server.memory import Peak
from tests.support import load
from tests.support.fake_vllm import FakeVllm


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that the garbage collector looked through."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.mark.parametrize(
    ("in_flight", "times"),
    [
        ([2000, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        ([0, 300, 2000, 900, 499, 498, 9, 9, 9, 0], 1),
        ([2000, 0, 0, 0, 0, 2000, 0, 0, 0, 0], 2),
        ([2000] + [0] * 200, 12),
        ([2000] + [300] * 100 + [0] * 200, 24),
        ([2000, 0, 0, 0, 2000, 0, 0, 0], 0),
        ([2000, 600, 600, 600, 600, 600], 0),
        ([30, 0, 0, 0, 0, 0], 0),
    ],
)
def test_memory_is_given_back_once_most_of_many_are_over(
    in_flight: list[int], times: int, collections: list[int]
) -> None:
    async def look() -> None:
        peak = Peak()
        for count in in_flight:
            peak.look(count)
        assert collections.count(2) == times

    asyncio.run(look())


def test_what_was_made_to_give_memory_back_is_given_back_too(collections: list[int]) -> None:
    async def look() -> None:
        peak = Peak()
        for count in (2000, 0, 0, 0, 0):
            peak.look(count)
        assert collections.count(2) == 1
        await asyncio.sleep(0.01)
        assert collections.count(2) == 2

    asyncio.run(look())


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
        peak = Peak()
        for count in (2000, 0, 0, 0, 0):
            peak.look(count)
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
    # glibc sets 64 MiB aside for each other heap, of which it opens as much as is used.
    assert not [line for line in maps if re.match(r"[0-9a-f]+-[0-9a-f]+[048c]000000 ---p ", line)]


def test_a_server_loads_nothing_that_it_never_uses() -> None:
    code = (
        "import contextlib, sys; from gateway.__main__ import main; sys.argv[1:] = ['--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "assert 'gateway.app' in sys.modules\n"
        "sys.exit('rich' in sys.modules or 'pygments' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0

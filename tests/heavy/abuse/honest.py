"""The honest client: a few callers, whose streams are timed to their first token."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from dataclasses import dataclass, field

import orjson

from tests.support.fake_vllm import DONE

KEY = "honest-81d35a4f7d0c9a2b6e"
CALLERS = 8
PAUSE = 0.05


@dataclass
class Seen:
    """What it got: seconds to a first token, and how many calls were refused or lost."""

    first_tokens: list[float] = field(default_factory=list)
    refused: int = 0
    lost: int = 0

    @property
    def median(self) -> float:
        """In milliseconds."""
        return 1000 * statistics.median(self.first_tokens)

    @property
    def worst(self) -> float:
        """In milliseconds."""
        return 1000 * max(self.first_tokens)


async def calls(port: int, seconds: float, text: str = "Hi") -> Seen:
    """Call for so long."""
    seen, until = Seen(), time.monotonic() + seconds
    await asyncio.gather(*(_caller(port, until, text, seen) for _ in range(CALLERS)))
    return seen


async def _caller(port: int, until: float, text: str, seen: Seen) -> None:
    call = {"model": "demo", "messages": [{"role": "user", "content": text}], "stream": True}
    body = orjson.dumps(call)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    while time.monotonic() < until:
        try:
            # Of an address of its own, as a hostile client has another.
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        except OSError:
            seen.lost += 1
            await asyncio.sleep(PAUSE)
            continue
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            for _ in range(20):
                if time.monotonic() >= until:
                    break
                seen.lost += 1  # until it has come
                began = time.monotonic()
                writer.write(request)
                head_of_answer = await reader.readuntil(b"\r\n\r\n")
                if not head_of_answer.startswith(b"HTTP/1.1 200 "):
                    seen.lost -= 1
                    seen.refused += 1
                    break
                await reader.readuntil(b"data: ")
                seen.first_tokens.append(time.monotonic() - began)
                await reader.readuntil(DONE)
                await reader.readuntil(b"0\r\n\r\n")
                seen.lost -= 1
                await asyncio.sleep(PAUSE)
        writer.transport.abort()

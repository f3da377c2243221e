"""The gateway as it is served, with the longest turn of its loop written to a file.

`python -m tests.heavy.abuse.measured FILE`.

A turn is told by the CPU time that the thread had between two beats, so that a busy machine does not lengthen it; what
a beat's interval has of other turns, 2 ms at most, is part of what is told.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from gateway import app
from gateway.cli import main

INTERVAL = 0.002


class Beat:
    """Tells the longest turn since its start, in milliseconds."""

    def __init__(self, file: str) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT)
        self._loop = asyncio.get_running_loop()
        self._longest = 0.0
        self._last = time.thread_time()
        self._beat()

    def _beat(self) -> None:
        now = time.thread_time()
        if now - self._last > self._longest:
            self._longest = now - self._last
            os.pwrite(self._file, b"%9.3f\n" % (1000 * self._longest), 0)
        self._last = time.thread_time()
        self._loop.call_later(INTERVAL, self._beat)


def run(file: str) -> None:
    periodic_work = vars(app)["run_periodic_work"]

    async def with_beat(*given: Any) -> None:
        Beat(file)
        await periodic_work(*given)

    vars(app)["run_periodic_work"] = with_beat
    sys.argv = ["vllm-gateway", "serve"]
    main()


if __name__ == "__main__":
    run(sys.argv[1])

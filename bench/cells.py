"""What is measured of an arm: each cell is a load and the figures that come of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.arms import MOCK_PORT, REPOSITORY, Arm
from bench.mock import MODEL
from bench.processes import cpu_us

Figures = dict[str, float]

_SYSTEM = "You are a helpful assistant. Answer from the search results."
_QUESTION = "What is deep learning? " * 8
_PROMPT = "Search results: " + "deep learning is a branch of machine learning " * 1460


class Failed(Exception):
    """A load that did not get what it should have."""


def body(*, simplified: bool, prompt: str = _QUESTION, stream: str = "") -> str:
    """A call of either form; `stream` is the mock's `events:interval:delay`, empty for a whole answer."""
    prompt = f"{stream} {prompt}"
    if simplified:
        call = {"messages": {"system": _SYSTEM, "user": prompt}, "max_new_tokens": 64, "streaming": bool(stream)}
    else:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
        call = {"messages": messages, "max_tokens": 64, "temperature": 0.01, "stream": bool(stream)}
    return json.dumps({"model": MODEL, **call})


class Cells:
    """The loads; they run on the first core."""

    def __init__(self, folder: Path, core: int) -> None:
        self._folder = folder
        self._core = core

    def json(self, connections: int, prompt: str = _QUESTION) -> Callable[[Arm], Figures]:
        """Whole answers, by wrk."""

        def cell(arm: Arm) -> Figures:
            file = self._folder / "body.json"
            file.write_text(body(simplified=arm.simplified, prompt=prompt))
            url = f"http://127.0.0.1:{arm.port}/v1/chat/completions"
            command = [
                "wrk",
                "-t1",
                f"-c{connections}",
                f"-d{2 if arm.slow else 1}s",
                "-s",
                str(REPOSITORY / "bench" / "post.lua"),
            ]
            with self._checked():
                cpu = cpu_us(arm.pid)
                said = self._run([*command, "--timeout", "20s", url], {"BENCH_BODY": str(file), "BENCH_KEY": arm.key})
                cpu = cpu_us(arm.pid) - cpu
            found = re.search("RESULT (.*)", said)
            if found is None:
                raise Failed(f"wrk told no result, but {said[-200:]!r}")
            result = json.loads(found[1])
            if result["errors"] or not result["requests"]:
                raise Failed(str(result))
            return {
                "cpu_us_per_request": cpu / result["requests"],
                "requests_per_s": result["requests"] / result["seconds"],
                "p50_ms": result["p50_ms"],
                "p99_ms": result["p99_ms"],
            }

        return cell

    def streams(self, count: int, events: int, interval: int) -> Callable[[Arm], Figures]:
        """Streams paced in milliseconds; 0 for as fast as they come."""
        window = (0.1, events * interval / 1000 - 0.35) if interval else None
        return lambda arm: self._load(arm, f"{events}:{interval}:0", streams=count, events=events, window=window)

    def memory(self, count: int) -> Callable[[Arm], Figures]:
        """Open streams with slow tokens."""
        return lambda arm: self._load(arm, "100:2000:0", streams=count, events=100, hold=True)

    def leaving(self, *, after: float) -> Callable[[Arm], Figures]:
        """How long the upstream's connection outlives the client: left in its answer, or before it, after so long."""
        stream = "100:50:60000" if after else "100:50:0"

        def cell(arm: Arm) -> Figures:
            before = self._counts()
            left = self._load_raw(arm, stream, streams=2, events=100, leave=after)["left"]
            aborts = self._counts()["aborts"][len(before["aborts"]) :]
            late = [min((abort - one for abort in aborts if abort > one), default=2.5e9) / 1e6 for one in left]
            return {"closed_p50_ms": median(late), "closed_max_ms": max(late)}

        return cell

    def _load(self, arm: Arm, stream: str, **plan: object) -> Figures:
        with self._checked():
            return self._load_raw(arm, stream, **plan)

    def _load_raw(self, arm: Arm, stream: str, **plan: object) -> dict[str, Any]:
        call = body(simplified=arm.simplified, stream=stream)
        told = json.dumps({"port": arm.port, "pid": arm.pid, "body": call, **plan})
        return dict(json.loads(self._run([sys.executable, "-m", "bench.load", told], {})))

    def _run(self, command: list[str], environment: dict[str, str]) -> str:
        done = subprocess.run(
            ["taskset", "-c", str(self._core), *command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise Failed((done.stderr or done.stdout).strip().splitlines()[-1])
        return done.stdout

    def _counts(self) -> dict[str, Any]:
        answer = httpx.get(f"http://127.0.0.1:{MOCK_PORT}/bench/counts", trust_env=False, timeout=20)
        return dict(answer.json())

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Nothing was sent upstream that is not what was asked, and something was."""
        before = self._counts()
        yield
        after = self._counts()
        if after["refused"] != before["refused"] or after["requests"] == before["requests"]:
            raise Failed(f"the upstream got {after['refused'] - before['refused']} calls that it had to refuse")


def prompt_67k() -> str:
    """About 67 KB of text."""
    return _PROMPT

"""What is measured of an arm: each cell is a load and the figures that come of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.arms import MOCK_PORT, REPOSITORY, Arm
from bench.load import RAMP
from bench.mock import MODEL, TURN
from bench.processes import cpu_us, signal_all

Figures = dict[str, list[float]]
# of each arm by its name
Outcomes = dict[str, "Figures | Failed"]
Cell = Callable[[list[Arm]], Outcomes]

# Before a gateway that stood still is asked, in seconds.
_WAKING = 0.15

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
    """The loads; they run on the first core.

    Where CPU is counted, all gateways of a cell are up at the same time and work in turns of a fraction of a second: a
    shared machine is twice as slow for a second or two and then is not, which strikes all of them alike.
    """

    def __init__(self, folder: Path, core: int) -> None:
        self._folder = folder
        self._core = core
        # One connection, as it is asked before and after each turn.
        self._mock = httpx.Client(base_url=f"http://127.0.0.1:{MOCK_PORT}", trust_env=False, timeout=20)

    def json(self, connections: int, prompt: str = _QUESTION, *, turns: int = 10, seconds: float = 0.1) -> Cell:
        """Whole answers, by wrk; the seconds of a turn are four times as many for slow ones."""

        def cell(arms: list[Arm]) -> Outcomes:
            before = self._counts()
            with contextlib.ExitStack() as stack:
                loads = [stack.enter_context(self._wrk(arm, connections, prompt)) for arm in arms]
                for number in range(turns):
                    for load in loads:
                        asked = self._counts()["requests"]
                        load.take_turn(seconds, last=number == turns - 1)
                        load.asked(self._counts()["requests"] - asked)
                outcomes = {load.arm.name: load.outcome() for load in loads}
            return self._checked(before, outcomes)

        return cell

    @contextlib.contextmanager
    def _wrk(self, arm: Arm, connections: int, prompt: str) -> Iterator[_Wrk]:
        file = self._folder / f"{arm.name}.json"
        file.write_text(body(simplified=arm.simplified, prompt=prompt))
        url = f"http://127.0.0.1:{arm.port}/v1/chat/completions"
        script = str(REPOSITORY / "bench" / "post.lua")
        # It is told when to end.
        # Of 64 requests at once a slow one has the last answered after 20 s, most of them in others' turns.
        patience = "60s" if arm.slow else "20s"
        options = ["-t1", f"-c{connections}", "-d600s", "-s", script, "--timeout", patience]
        load = _Wrk(arm, [*self._command("wrk"), *options, url], {"BENCH_BODY": str(file), "BENCH_KEY": arm.key})
        try:
            yield load
        finally:
            load.kill()

    def paced(self, count: int, turns: int = 5) -> Cell:
        """Streams of 50 events a second: all of them are open, and speak for an arm at a time; others stand still."""

        events = 1 + turns * round(TURN * 50)

        def cell(arms: list[Arm]) -> Outcomes:
            before = self._counts()
            with contextlib.ExitStack() as stack:
                for arm in arms:
                    stack.enter_context(awake(arm))
                # Where delays are looked at, what a gateway puts off until it is idle is not to be among them.
                time.sleep(0.6)
                begin = time.monotonic() + 0.7  # for the load to start
                first, cycle = begin + len(arms) * (RAMP + 0.1), len(arms) * TURN
                plans = []
                for number, arm in enumerate(arms):
                    starts = [first + number * TURN + turn * cycle for turn in range(turns)]
                    stream = f"{events}:20:0:{starts[0] * 1000:.0f}:{cycle * 1000:.0f}"
                    own_begin = begin + number * (RAMP + 0.1)
                    plans.append(_plan(arm, stream, streams=count, events=events, begin=own_begin, turns=starts))
                    plans[-1]["stands_still"] = arm.name != "direct"
                found = self._load(plans)
            return self._checked(before, {arm.name: one for arm, one in zip(arms, found, strict=True)})

        return cell

    def flood(self, count: int, events: int) -> Cell:
        """Streams as fast as they come."""
        return self._one_by_one(lambda arm: self._load([_plan(arm, f"{events}:0:0", streams=count, events=events)])[0])

    def memory(self, count: int) -> Cell:
        """Open streams with slow tokens."""
        return self._one_by_one(
            lambda arm: self._load([_plan(arm, "100:2000:0", streams=count, events=100, hold=True)])[0]
        )

    def leaving(self, *, after: float) -> Cell:
        """How long the upstream's connection outlives the client: left in its answer, or before it, after so long."""
        stream = "100:50:60000" if after else "100:50:0"

        def leave(arm: Arm) -> Figures | Failed:
            self._ask("aborts")  # those before
            (told,) = self._load([_plan(arm, stream, streams=2, events=100, leave=after)])
            if isinstance(told, Failed):
                return told
            aborts = self._ask("aborts")
            late = [min((abort - one for abort in aborts if abort > one), default=2.5e9) / 1e6 for one in told["left"]]
            return {"closed_p50_ms": [median(late)], "closed_max_ms": [max(late)]}

        return self._one_by_one(leave)

    def _one_by_one(self, measure: Callable[[Arm], Any]) -> Cell:
        def cell(arms: list[Arm]) -> Outcomes:
            outcomes: Outcomes = {}
            for arm in arms:
                before = self._counts()
                with awake(arm):
                    outcomes |= self._checked(before, {arm.name: measure(arm)})
            return outcomes

        return cell

    def _load(self, plans: list[dict[str, Any]]) -> list[Any]:
        """What each plan has told, or how it failed."""
        done = subprocess.run(
            [*self._command(sys.executable), "-m", "bench.load", json.dumps(plans)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            timeout=120,
            check=False,
        )
        if done.returncode:
            return [Failed((done.stderr or done.stdout).strip().splitlines()[-1])] * len(plans)
        return [Failed(one["failed"]) if "failed" in one else one for one in json.loads(done.stdout)]

    def _command(self, tool: str) -> list[str]:
        return ["taskset", "-c", str(self._core), tool]

    def _counts(self) -> dict[str, int]:
        return dict(self._ask("counts"))

    def _ask(self, what: str) -> Any:
        return self._mock.get(f"/bench/{what}").raise_for_status().json()

    def _checked(self, before: dict[str, int], outcomes: Outcomes) -> Outcomes:
        """Nothing was sent upstream that is not what was asked, and something was."""
        after = self._counts()
        if after["refused"] == before["refused"] and after["requests"] > before["requests"]:
            return outcomes
        why = f"the upstream got {after['refused'] - before['refused']} calls that it had to refuse"
        return dict.fromkeys(outcomes, Failed(why))


class _Wrk:
    """A run of wrk that stands still, with its gateway, but for its turns."""

    def __init__(self, arm: Arm, command: list[str], environment: dict[str, str]) -> None:
        self.arm = arm
        self._command = command
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self._seconds = 0.0
        self._cpu_us = 0.0
        self._per_request: list[float] = []

    def take_turn(self, seconds: float, *, last: bool) -> None:
        with awake(self.arm, 0 if self._process else _WAKING):
            begun, cpu = time.monotonic(), cpu_us(self.arm.pid)
            if self._process:
                self._process.send_signal(signal.SIGCONT)
            else:
                self._process = subprocess.Popen(
                    self._command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=self._environment,
                )
            time.sleep(seconds * (4 if self.arm.slow else 1))
            if last:
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
            else:
                self._process.send_signal(signal.SIGSTOP)
            self._seconds += time.monotonic() - begun
            self._cpu_us = cpu_us(self.arm.pid) - cpu

    def asked(self, requests: int) -> None:
        """So many came upstream in the last turn."""
        self._per_request.append(self._cpu_us / requests if requests else 0)

    def outcome(self) -> Figures | Failed:
        self.kill()
        said = self._process.communicate()[0] if self._process else ""
        found = re.search("RESULT (.*)", said)
        if found is None:
            return Failed(f"wrk told no result, but {said[-200:]!r}")
        result = json.loads(found[1])
        if result["errors"] or not result["requests"]:
            return Failed(str(result))
        return {
            "cpu_us_per_request": self._per_request,
            "requests_per_s": [result["requests"] / self._seconds],
            "p50_ms": [result["p50_ms"]],
            "p99_ms": [result["p99_ms"]],
        }

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()


@contextlib.contextmanager
def awake(arm: Arm, seconds: float = _WAKING) -> Iterator[None]:
    """A gateway runs while it is looked at, and so much before: for its probes, and connections that died meanwhile.

    What does not run now must not take the core from what does.
    """
    # The upstream itself, asked directly, is always up.
    if arm.name == "direct":
        yield
        return
    signal_all(arm.process, signal.SIGCONT)
    time.sleep(seconds)
    try:
        yield
    finally:
        signal_all(arm.process, signal.SIGSTOP)


def _plan(arm: Arm, stream: str, **plan: object) -> dict[str, Any]:
    """A `load.Plan` as JSON."""
    return {"port": arm.port, "pid": arm.pid, "body": body(simplified=arm.simplified, stream=stream), **plan}


def prompt_67k() -> str:
    """About 67 KB of text."""
    return _PROMPT

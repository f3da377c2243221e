"""Gateways that share nothing, behind nginx, in front of scripted upstreams that are killed, come and go.

Not among the tests that `make test` finds; `make test-routing` runs it. It needs nginx, and root for a hosts file that
a gateway alone sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import orjson
import pytest

from tests.heavy.restarts import nginx
from tests.support.fake_vllm import DONE, EVENTS, MODEL, STREAM_END, STREAM_HEAD, FakeVllm, Received, Step, chunk
from tests.support.load import gateway
from tests.support.named_vllm import NamedProcess

CHAT = "/v1/chat/completions"
TEMPLATE = "You are a helpful assistant and answer from the search results alone. " * 8
# What takes longer never comes about, on a machine however busy.
PATIENCE = 60.0


def body(key: int) -> bytes:
    """A call that begins as all do, and goes on as those of its key."""
    said = f"{TEMPLATE}Document {key} says what it says. " + "It says no more. " * 60
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": said}], "stream": True})


@dataclass(frozen=True)
class Call:
    """Its key, from when to when it was, and the port of the upstream that answered, if that has said its port.

    `outcome` is `answered`, `told` for an error that has its proper form and end, or whatever else came.
    """

    key: int
    began: float
    ended: float
    outcome: str
    port: int | None


class Load:
    """Callers that go on and on, about all keys in turn, each round in another order."""

    def __init__(self, port: int, keys: int, callers: int) -> None:
        self.calls: list[Call] = []
        self._url = f"http://127.0.0.1:{port}{CHAT}"
        self._number, self._callers = keys, callers
        self._keys = self._in_turn()

    def _in_turn(self) -> Iterator[int]:
        chance = random.Random(1)
        while True:
            yield from chance.sample(range(self._number), self._number)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the context lasts; what they have asked for then is answered first."""
        limits = httpx.Limits(max_connections=self._callers)
        stopping = asyncio.Event()
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE, limits=limits) as client:
            callers = [asyncio.create_task(self._caller(client, stopping)) for _ in range(self._callers)]
            try:
                yield
            finally:
                stopping.set()
                await asyncio.gather(*callers)

    async def _caller(self, client: httpx.AsyncClient, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            key, began = next(self._keys), time.monotonic()
            outcome, port = await self._call(client, key)
            self.calls.append(Call(key, began, time.monotonic(), outcome, port))

    async def _call(self, client: httpx.AsyncClient, key: int) -> tuple[str, int | None]:
        try:
            answer = await client.post(self._url, content=body(key))
        except httpx.TransportError as error:
            return repr(error), None
        found = re.search(rb'"content":"(\d+)"', answer.content)
        port = int(found[1]) if found else None
        if answer.status_code == 502 and "error" in answer.json():
            return "told", port
        if answer.status_code != 200 or not answer.content.endswith(DONE):
            return f"{answer.status_code}: {answer.text}", port
        return "told" if b'data: {"error"' in answer.content else "answered", port

    async def rounds(self, number: int) -> list[Call]:
        """Calls that begin from now on: so many of each key, and some more."""
        began = time.monotonic()
        while len(calls := [call for call in self.calls if call.began >= began]) < (number + 1) * self._number:
            assert time.monotonic() < began + PATIENCE, f"{len(calls)} calls came to an end"
            await asyncio.sleep(0.05)
        return calls


def homes(calls: Iterable[Call]) -> dict[int, int]:
    """Of each key the port that answered most of its calls."""
    counts: dict[int, Counter[int]] = {}
    for call in calls:
        if call.port is not None:
            counts.setdefault(call.key, Counter())[call.port] += 1
    return {key: count.most_common(1)[0][0] for key, count in counts.items()}


def at_home(calls: Sequence[Call]) -> float:
    """The part of these calls that their keys' homes answered."""
    found = homes(calls)
    return sum(call.port == found[call.key] for call in calls) / len(calls)


def routed(port: int) -> Counter[str]:
    """What a gateway counted, by how."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=PATIENCE).text
    found = re.findall(r'^gateway_routed_total\{how="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return Counter({how: int(float(count)) for how, count in found})


async def become(ports: Sequence[int], states: dict[str, str]) -> None:
    """Wait until each of these gateways has these upstreams in these states, and others at most to end their calls."""
    until = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
        for port in ports:
            while True:
                told = (await client.get(f"http://127.0.0.1:{port}/v1/status")).json()["upstreams"]
                if {one["url"]: one["state"] for one in told if one["state"] != "draining"} == states:
                    break
                assert time.monotonic() < until, f"the upstreams stay {told}"
                await asyncio.sleep(0.02)


@contextlib.contextmanager
def processes(number: int) -> Iterator[list[NamedProcess]]:
    """So many scripted upstreams."""
    made = [NamedProcess() for _ in range(number)]
    with contextlib.ExitStack() as stack:
        for one in made:
            stack.callback(one.kill)
            one.start()
        yield made


@contextlib.contextmanager
def three_gateways(upstreams: Sequence[NamedProcess], folder: Path, **settings: str) -> Iterator[tuple[int, list[int]]]:
    """nginx's port, and those of the gateways behind it, each of which is told of the upstreams in another order."""
    urls = [one.url for one in upstreams]
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(gateway([*urls[n:], *urls[:n]], 0, **settings))[1] for n in range(3)]
        yield stack.enter_context(nginx(ports, folder)), ports


@pytest.mark.parametrize("routing", ["prefix", "least"])
def test_gateways_that_share_nothing_send_what_begins_alike_to_one_upstream(
    routing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def play(port: int, ports: list[int], urls: list[str]) -> tuple[list[Call], list[Call]]:
        await become(ports, dict.fromkeys(urls, "serving"))
        load = Load(port, 60, 32)
        async with load.running():
            return await load.rounds(4), await load.rounds(11)

    with processes(4) as upstreams, three_gateways(upstreams, tmp_path, GATEWAY_ROUTING=routing) as (port, ports):
        learning, calls = asyncio.run(play(port, ports, [one.url for one in upstreams]))
        taken = [routed(one).total() for one in ports]
    with capsys.disabled():
        click.echo(
            f"\n{routing}: of {len(calls)} calls about 60 keys by three gateways {at_home(calls):.3f} went to their "
            f"key's first place among four upstreams, of {len(learning)} before {at_home(learning):.3f}"
        )
    assert {call.outcome for call in [*learning, *calls]} == {"answered"}
    assert min(taken) > sum(taken) / 4  # nginx asks each in its turn
    if routing == "least":
        assert at_home(calls) < 0.6
    else:
        assert at_home(calls) >= 0.98
        assert len(set(homes(calls).values())) == 4


def test_one_of_three_upstreams_that_is_killed_under_load_costs_no_call_that_another_may_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills: list[tuple[float, float]] = []

    def kill(victim: NamedProcess) -> None:
        began = time.monotonic()
        victim.kill()
        kills.append((began, time.monotonic()))

    async def play(port: int, ports: list[int], upstreams: list[NamedProcess]) -> None:
        serving = {one.url: "serving" for one in upstreams}
        await become(ports, serving)
        load = Load(port, 150, 32)
        async with load.running():
            await load.rounds(2)  # in which they learn what all share
            before = homes(await load.rounds(3))
            by_keys = Counter(before.values())
            # Of three parts that chance makes, the middle one.
            victim = sorted(upstreams, key=lambda one: by_keys[one.port])[1]
            down = serving | {victim.url: "down"}
            kill(victim)
            await become(ports, down)
            while_down = homes(await load.rounds(3))
            await asyncio.to_thread(victim.start)
            await become(ports, serving)
            after = homes(await load.rounds(3))
        # Whom a kill costs a call knows at once. With few callers some have none there, and their next finds nobody.
        few = Load(port, 150, 6)
        async with few.running():
            for _ in range(5):
                kill(victim)
                await become(ports, down)
                await asyncio.to_thread(victim.start)
                await become(ports, serving)

        calls = [*load.calls, *few.calls]
        told = [call for call in calls if call.outcome == "told"]
        retried = sum(routed(one)["retried"] for one in ports)
        moved = [key for key in before if while_down[key] != before[key]]
        with capsys.disabled():
            click.echo(
                f"\nkill -9 of one of three upstreams: {len(moved)} of {len(before)} keys moved, "
                f"{sum(after[key] != before[key] for key in before)} have not returned; of {len(calls)} calls "
                f"{len(told)} broke at {len(kills)} kills, {retried} were taken by another"
            )
        # A call that the killed one had may have begun there, and is begun nowhere else; all others have an answer.
        assert {call.outcome for call in calls} <= {"answered", "told"}
        assert [one for one in told if not any(one.began <= end and begin <= one.ended for begin, end in kills)] == []
        assert retried
        assert {before[key] for key in moved} == {victim.port}
        assert len(moved) <= 0.4 * len(before)
        assert after == before

    with processes(3) as upstreams, three_gateways(upstreams, tmp_path) as (port, ports):
        asyncio.run(play(port, ports, upstreams))


class Pod(FakeVllm):
    """Its streams take half a second."""

    def answer_to(self, request: Received) -> Sequence[Step]:
        """Such a one."""
        return [STREAM_HEAD, *(step for one in EVENTS[:-1] for step in (chunk(one), 0.1)), chunk(DONE), STREAM_END]

    def wait_for_more(self, calls: int) -> None:
        """Until more calls have come than these."""
        self.wait(lambda: len(self.received) > calls, PATIENCE)


def test_who_joins_by_dns_is_used_within_an_interval_and_a_second_and_who_leaves_cuts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hosts"
    hosts.touch()
    name = "pods-of-this-test"

    def lead_to(pods: Sequence[Pod]) -> None:
        # In place, and always as long, so that nobody reads a half.
        with hosts.open("r+") as file:
            file.write("".join(f"{pod.host} {name}\n" for pod in pods))

    async def play(port: int, pods: list[Pod]) -> None:
        load, took = Load(port, 50, 50), []
        await become([port], {one.url: "serving" for one in pods[:2]})
        async with load.running():
            for change in range(1, 21):
                named = [pods[change % 4], pods[(change + 1) % 4]]
                had = len(named[1].received)
                began = time.monotonic()
                lead_to(named)
                await asyncio.to_thread(named[1].wait_for_more, had)
                took.append(time.monotonic() - began)
                await become([port], {one.url: "serving" for one in named})
                await load.rounds(0)
        with capsys.disabled():
            click.echo(
                f"\n20 joins and leaves under 50 streams: {len(load.calls)} calls; a call came "
                f"{max(took):.2f} s after a join at the latest"
            )
        assert {call.outcome for call in load.calls} == {"answered"}
        assert max(took) <= 1 + 1  # GATEWAY_PROBE_INTERVAL, and a second

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Pod(host="127.0.0.2"))
        pods = [first, *(stack.enter_context(Pod(first.port, host=f"127.0.0.{number}")) for number in (3, 4, 5))]
        lead_to(pods[:2])
        as_its_own = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts))
        _, port = stack.enter_context(gateway([f"dns+http://{name}:{first.port}"], by=as_its_own))
        asyncio.run(play(port, pods))

"""Upstreams that come and go by their name's addresses, on both ways in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from gateway import app
from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
INTERVAL = 0.05


class Pods:
    """Servers at addresses of their own and one port, of which a name leads to some."""

    def __init__(self, stack: ExitStack) -> None:
        first = stack.enter_context(FakeVllm(host="127.0.0.2"))
        others = [stack.enter_context(FakeVllm(first.port, host=f"127.0.0.{number}")) for number in (3, 4, 5)]
        self.all = [first, *others]
        self.url = f"dns+http://pods:{first.port}"
        self.named: list[FakeVllm] = []

    async def find(self, host: str, family: int) -> list[str]:
        if not self.named:
            raise OSError("no such name")
        return [one.host for one in self.named]

    async def close(self) -> None: ...


@pytest.fixture
def pods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    with ExitStack() as stack:
        made = Pods(stack)
        monkeypatch.setattr(app, "SystemLookup", lambda: made)
        yield made


def told(client: httpx.Client) -> list[dict[str, Any]]:
    """How the gateway says that its upstreams are."""
    found: list[dict[str, Any]] = client.get("/v1/status").json()["upstreams"]
    return found


def serving(gateway: Gateway, pods: list[FakeVllm]) -> None:
    """Wait until these are all that serve."""
    wanted = [(one.url, "serving") for one in pods]
    until = time.monotonic() + 20
    with gateway.client() as client:
        while [(one["url"], one["state"]) for one in told(client) if one["state"] != "draining"] != wanted:
            assert time.monotonic() < until
            time.sleep(0.01)


def ask(client: httpx.Client, number: int = 0) -> int:
    text = f"Document {number} says what it says. " * 20
    return client.post(CHAT, json={**OPENAI, "messages": [{"role": "user", "content": text}]}).status_code


def test_a_call_has_the_name_that_was_given(pods: Pods) -> None:
    pods.named = pods.all[:2]
    with running(pods.url, probe_interval=INTERVAL) as gateway, gateway.client() as client:
        assert [ask(client, number) for number in range(8)] == [200] * 8
    asked = [got for one in pods.all[:2] for got in [*one.received, *one.probed]]
    assert {got.header("host") for got in asked} == {f"pods:{pods.all[0].port}"}


def test_until_the_name_leads_somewhere_a_call_is_told_so(pods: Pods) -> None:
    with running(pods.url, probe_interval=INTERVAL) as gateway, gateway.client() as client:
        refused = client.post(CHAT, json=OPENAI)
        assert (refused.status_code, "GATEWAY_UPSTREAMS leads to none" in refused.text) == (503, True)
        health = client.get("/v1/health_check")
        assert health.status_code == 503
        (nowhere,) = health.json()["upstreams"]
        assert (nowhere["url"], nowhere["state"], nowhere["models"]) == (pods.url, "down", [])
        assert nowhere["why"] == "its name leads to no address (no such name)"
        assert [one["why"] for one in told(client)] == [nowhere["why"]]
        assert client.get("/ping").status_code == 503
        assert client.post(CHAT, json={"messages": {"user": "Hi"}}).status_code == 503
        pods.named = pods.all[:1]
        serving(gateway, pods.named)
        assert ask(client) == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "demo"


def test_one_that_is_gone_gets_no_call_and_ends_what_it_has(pods: Pods) -> None:
    hold = Hold()
    pods.named = pods.all[:1]
    pods.all[0].queue([STREAM_HEAD, chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
    with running(pods.url, probe_interval=INTERVAL) as gateway, gateway.client() as client:
        serving(gateway, pods.named)
        with gateway.client() as other, other.stream("POST", CHAT, json={**OPENAI, "stream": True}) as stream:
            assert hold.reached.wait(10)
            assert ask(client) == 200  # which leaves an idle connection
            pods.named = pods.all[1:2]
            serving(gateway, pods.named)
            (leaving,) = [one for one in told(client) if one["state"] == "draining"]
            assert (leaving["url"], leaving["in_flight"]) == (pods.all[0].url, 1)
            assert f'gateway_upstream_state{{state="draining",upstream="{pods.all[0].url}"}} 1.0' in (
                client.get("/metrics").text
            )
            pods.all[0].wait(lambda: len(pods.all[0].open) == 1)
            assert [ask(client, number) for number in range(6)] == [200] * 6
            hold.release()
            assert stream.read() == b"".join(EVENTS)
        assert [one["state"] for one in told(client)] == ["serving"]
        pods.all[0].wait(lambda: not pods.all[0].open)
    assert (len(pods.all[0].received), len(pods.all[1].received)) == (2, 6)


def test_none_is_refused_or_cut_while_they_come_and_go(pods: Pods) -> None:
    """Fifty streams at a time, and twenty changes."""
    streams = [STREAM_HEAD, *[step for event in EVENTS[:-1] for step in (chunk(event), 0.2)], chunk(DONE), STREAM_END]
    for one in pods.all:
        one.queue(*[streams] * 2000)
    pods.named = pods.all[:2]
    ends: list[float] = []
    with running(pods.url, probe_interval=INTERVAL) as gateway:

        def call(number: int) -> list[bytes]:
            answers = []
            with gateway.client() as client:
                while not ends:
                    text = f"Document {number} says what it says. " * 20
                    body = {**OPENAI, "messages": [{"role": "user", "content": text}], "stream": True}
                    answers.append(client.post(CHAT, json=body).content)
            return answers

        with ThreadPoolExecutor(50) as threads:
            calls = [threads.submit(call, number) for number in range(50)]
            try:
                for change in range(1, 21):
                    pods.named = [pods.all[change % 4], pods.all[(change + 1) % 4]]
                    serving(gateway, sorted(pods.named, key=lambda one: one.host))
                    time.sleep(2 * INTERVAL)
            finally:
                ends.append(0)
            answers = [answer for one in calls for answer in one.result()]
        told = gateway.log(len(answers))
    assert len(answers) >= 100  # of a second each
    assert [answer for answer in answers if answer != b"".join(EVENTS)] == []
    assert {(line["status"], line["outcome"]) for line in told} == {(200, "done")}
    assert all(one.received for one in pods.all)

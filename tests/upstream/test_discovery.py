"""Upstreams by a name's addresses: what each answer makes of the pool, by lookups of the test's own and by c-ares."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiodns
import pytest

from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.upstream import discovery as module
from gateway.upstream.discovery import Discovery, Source
from tests.support.name_server import name_server
from tests.upstream.test_connections import Run, run
from tests.upstream.test_resolver import NOT_FOUND, asking

__all__ = ["run"]  # a fixture

POD = "dns+http://pods:8000/pre"


class Names:
    """Answers by family what the test says; an exception is raised, None hangs."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        self.asked = 0
        self.closed = False

    async def find(self, host: str, family: int) -> list[str]:
        self.asked += family == socket.AF_INET
        answer = self.answers.get(family, NOT_FOUND)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    async def close(self) -> None:
        self.closed = True


class Found:
    """A pool that is kept by names, and what was told of it."""

    def __init__(self, *urls: str) -> None:
        self.names = Names()
        self.pool = UpstreamPool(())
        self.told: list[tuple[list[str], list[str]]] = []
        self.discovery = Discovery(
            [Source(url) for url in urls or (POD,)], self.pool, lambda: self.names, 0.001, self._changed
        )

    def _changed(self, came: list[Upstream], gone: list[Upstream], _doubted: list[Upstream]) -> None:
        self.told.append(([one.url for one in came], [one.url for one in gone]))
        assert all(one.gone for one in gone)

    def urls(self) -> list[str]:
        return [one.url for one in self.pool]

    async def becomes(self, *urls: str) -> None:
        for _ in range(5000):
            if self.urls() == list(urls):
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"they stay {self.urls()}")

    async def asked_again(self) -> None:
        """Until an answer of now has counted: two questions later, as one may be under way."""
        until = self.names.asked + 2
        for _ in range(5000):
            if self.names.asked >= until:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it is not asked again")

    @contextlib.asynccontextmanager
    async def following(self, *addresses: str) -> AsyncIterator[None]:
        self.names.answers[socket.AF_INET] = list(addresses)
        async with self.discovery.discovering():
            yield
        assert self.names.closed


def test_each_address_is_an_upstream_that_keeps_its_name(run: Run) -> None:
    async def work() -> None:
        found = Found(POD, "http://fixed:1")
        async with found.following("10.0.0.2", "10.0.0.1", "10.0.0.10"):
            assert found.urls() == [*[f"http://10.0.0.{n}:8000/pre" for n in (1, 2, 10)], "http://fixed:1"]
            first, *_, fixed = found.pool
            assert (first.host, first.at, first.authority) == ("pods", "10.0.0.1", "pods:8000")
            assert (first.origin, first.state) == ("http://pods:8000/pre", "loading")
            assert (fixed.host, fixed.at, fixed.origin) == ("fixed", "fixed", "http://fixed:1")

    run(work())


def test_they_come_and_go_and_those_that_stay_are_the_same(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1")
        async with found.following("10.0.0.1", "10.0.0.2"):
            before = {one.url: one for one in found.pool}
            found.names.answers[socket.AF_INET] = ["10.0.0.3", "10.0.0.2"]
            await found.becomes("http://10.0.0.2:1", "http://10.0.0.3:1")
            (stays, _) = found.pool
            assert stays is before["http://10.0.0.2:1"]
            assert found.told[1:] == [(["http://10.0.0.3:1"], ["http://10.0.0.1:1"])]
            # Back, it is another: nothing is known of it.
            found.names.answers[socket.AF_INET] = ["10.0.0.1"]
            await found.becomes("http://10.0.0.1:1")
            assert next(iter(found.pool)) is not before["http://10.0.0.1:1"]

    run(work())


@pytest.mark.parametrize(
    ("answer", "why"), [([], "no address"), (NOT_FOUND, "domain name not found"), (None, "no answer within 0.02 s")]
)
def test_an_answer_that_is_none_leaves_them_and_is_told_once(
    answer: object, why: str, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.02)

    async def work() -> None:
        found = Found("dns+http://pods:1")
        async with found.following("10.0.0.1"):
            found.names.answers[socket.AF_INET] = answer
            await asyncio.sleep(0.2)
            assert found.urls() == ["http://10.0.0.1:1"]
            found.names.answers[socket.AF_INET] = ["10.0.0.2"]
            await found.becomes("http://10.0.0.2:1")

    with caplog.at_level(logging.INFO):
        run(work())
    assert [record.message for record in caplog.records if "pods" in record.message] == [
        f"dns+http://pods:1 leads to no upstream: {why}; its last addresses are kept",
        "dns+http://pods:1 leads to upstreams again",
    ]


def test_a_name_that_leads_nowhere_yet_holds_no_start_up(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1", "http://10.0.0.9:1")
        found.names.answers[socket.AF_INET] = None
        began = asyncio.get_running_loop().time()
        async with found.discovery.discovering():
            assert asyncio.get_running_loop().time() - began < 3
            assert found.urls() == ["http://10.0.0.9:1"]

    run(work())


def test_what_two_urls_lead_to_is_one(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1", "http://10.0.0.1:1", "dns+http://also:1")
        async with found.following("10.0.0.1", "10.0.0.2"):
            assert found.urls() == ["http://10.0.0.1:1", "http://10.0.0.2:1"]

    run(work())


def test_other_addresses_count_where_there_are_no_a_records(run: Run) -> None:
    async def work() -> None:
        none: tuple[object, ...] = ([], NOT_FOUND)
        for first in none:
            found = Found("dns+https://pods")
            found.names.answers[socket.AF_INET6] = ["fd00::2", "fd00::1"]
            found.names.answers[socket.AF_INET] = first
            async with found.discovery.discovering():
                assert found.urls() == ["https://[fd00::1]", "https://[fd00::2]"]
                one = next(iter(found.pool))
                assert (one.at, one.port, one.tls, one.host) == ("fd00::1", 443, True, "pods")

    run(work())


def test_a_thousand_addresses_are_a_thousand_upstreams(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1")
        async with found.following(*[f"10.0.{n // 250}.{n % 250 + 1}" for n in range(1000)]):
            assert len(found.pool) == 1000
            for one in found.pool:
                one.state, one.models = "serving", ("m",)
            pool = UpstreamPool(tuple(found.pool), by_prefix=True)
            body = b'"messages"' + b"x" * 500
            assert pool.select("m", 0, key=pool.key_of("m", None, body)) is not None

    run(work())


def test_other_addresses_do_not_count_where_there_were_a_records_that_cannot_be_asked_for_now(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1")
        failed = aiodns.error.DNSError(aiodns.error.ARES_ESERVFAIL, "DNS server returned general failure")
        async with found.following("10.0.0.1"):
            found.names.answers = {socket.AF_INET: failed, socket.AF_INET6: ["fd00::1"]}
            await found.asked_again()
            assert found.urls() == ["http://10.0.0.1:1"]
            # And do where it is certain that there are none any more.
            found.names.answers[socket.AF_INET] = NOT_FOUND
            await found.becomes("http://[fd00::1]:1")

    run(work())


def test_of_absurdly_many_addresses_the_first_are_used_and_it_is_told_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1")
        many = [f"10.{n // 62500}.{n // 250 % 250}.{n % 250 + 1}" for n in range(70000)]
        async with found.following(*many):
            assert len(found.pool) == 1024
            assert found.urls()[-1] == "http://10.0.4.24:1"
            assert found.pool.astray == {"dns+http://pods:1": "it leads to 70000 addresses, of which 1024 are used"}
            found.names.answers[socket.AF_INET] = many[1:]
            await found.asked_again()
            found.names.answers[socket.AF_INET] = many[:2]
            await found.becomes("http://10.0.0.1:1", "http://10.0.0.2:1")
            assert found.pool.astray == {}

    with caplog.at_level(logging.INFO):
        run(work())
    assert [record.message for record in caplog.records if "pods" in record.message] == [
        "dns+http://pods:1 leads to 70000 addresses, of which 1024 at most are upstreams, and each is probed but "
        "rarely: see that the name is that of your model servers alone"
    ]


def test_a_name_that_nobody_follows_any_more_is_not_told_of(run: Run) -> None:
    async def work() -> None:
        found = Found("dns+http://pods:1")
        async with found.discovery.discovering():
            assert found.pool.astray == {"dns+http://pods:1": "its name leads to no address (domain name not found)"}
            found.discovery.follow([Source("http://10.0.0.9:1")])
            assert found.pool.astray == {}

    run(work())


@asynccontextmanager
async def named(
    addresses: Mapping[bytes, Sequence[str]], url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[UpstreamPool]:
    """What c-ares, and a name server with these addresses, make of a URL."""
    async with name_server(addresses) as port:
        asks = asking(port, monkeypatch)
        pool = UpstreamPool(())
        found = Discovery([Source(url)], pool, lambda: asks, 60, lambda *told: None)
        async with found.discovering():
            yield pool


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("empty", "dns server returned answer with no data"),
        ("unknown", "domain name not found"),
        ("fails", "dns server returned general failure"),
        ("hangs", "no answer within 0.3 s"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_as_what_it_is(
    name: str, why: str, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    url = f"dns+http://{name}.example:1"

    async def work() -> None:
        async with named({b"empty.example": []}, url, monkeypatch) as pool:
            assert len(pool) == 0
            assert pool.astray == {url: f"its name leads to no address ({why})"}

    run(work())
    assert [record.message for record in caplog.records] == [f"{url} leads to no upstream: {why}"]


def test_a_name_with_addresses_of_ipv6_alone_leads_to_these(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        found = {b"pods.example": ["fd00::2", "fd00::1"]}
        async with named(found, "dns+http://pods.example:1", monkeypatch) as pool:
            assert [one.url for one in pool] == ["http://[fd00::1]:1", "http://[fd00::2]:1"]
            assert pool.astray == {}

    run(work())


def test_a_thousand_addresses_come_by_tcp(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        found = {b"pods.example": [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(1000)]}
        async with named(found, "dns+http://pods.example:1", monkeypatch) as pool:
            assert [one.at for one in pool] == found[b"pods.example"]
            assert pool.astray == {}

    run(work())
    assert ["leads to 1000 addresses" in record.message for record in caplog.records] == [True]

"""Names' addresses by a clock of the test's own, and by c-ares from a name server of the test's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import aiodns
import pytest
import uvloop

from gateway.upstream import resolver
from gateway.upstream.resolver import NameNotFound, Resolver, SystemLookup, system_lookup
from tests.support.name_server import name_server
from tests.upstream.test_connections import Run, run

__all__ = ["run"]  # a fixture


class Loop(asyncio.SelectorEventLoop):
    """Its time passes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class Lookup:
    """Answers, fails or hangs as the test says, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: list[str] | Exception | None = ["192.0.2.1"]
        self.closed = False

    async def find(self, host: str, family: int) -> list[str]:
        self.asked.append(host)
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or []

    async def close(self) -> None:
        self.closed = True


NOT_FOUND = aiodns.error.DNSError(aiodns.error.ARES_ENOTFOUND, "Domain name not found")


class Names:
    """A resolver whose clock and lookup are the test's."""

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.resolver = Resolver(self.lookup)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._loop = loop

    async def pass_(self, seconds: float) -> None:
        """Time passes, and what is due in it is done."""
        for _ in range(round(seconds * 2)):
            self._loop.now += 0.5
            for _ in range(6):
                await asyncio.sleep(0)

    async def find(self, host: str = "vllm") -> list[str]:
        found = asyncio.create_task(self.resolver.addresses(host, 8008))
        for _ in range(12):
            await asyncio.sleep(0)
        if not found.done():
            await self.pass_(6)
        return [address[4][0] for address in await found]


def by_hand(work: Callable[[Names], Coroutine[Any, Any, None]]) -> None:
    async def with_names() -> None:
        names = Names()
        try:
            await work(names)
        finally:
            await names.resolver.close()
        assert names.lookup.closed

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(with_names())


def test_an_address_is_asked_of_nobody() -> None:
    async def work(names: Names) -> None:
        assert await names.find("192.0.2.7") == ["192.0.2.7"]
        assert await names.resolver.addresses("::1", 80) == [
            (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 80, 0, 0))
        ]
        assert names.lookup.asked == []

    by_hand(work)
    assert system_lookup(["192.0.2.7", "::1"]) is None


def test_many_who_ask_for_a_name_cost_one_lookup_and_it_is_asked_anew_every_five_seconds() -> None:
    async def work(names: Names) -> None:
        found = await asyncio.gather(*(names.resolver.addresses("vllm", 8008) for _ in range(20)))
        assert {address[4] for one in found for address in one} == {("192.0.2.1", 8008)}
        assert len(names.lookup.asked) == 1
        await names.pass_(20.5)
        assert len(names.lookup.asked) == 5

    by_hand(work)


def test_the_last_answer_is_kept_for_minutes_while_asking_fails() -> None:
    for failure in (NOT_FOUND, None):

        async def work(names: Names, failure: Exception | None = failure) -> None:
            assert await names.find() == ["192.0.2.1"]
            names.lookup.answer = failure
            await names.pass_(290)
            assert await names.find() == ["192.0.2.1"]
            await names.pass_(20)
            with pytest.raises(NameNotFound, match="its name"):
                await names.find()
            names.lookup.answer = ["192.0.2.2"]
            await names.pass_(31)
            assert await names.find() == ["192.0.2.2"]

        by_hand(work)


def test_a_name_that_hangs_is_asked_less_often_and_delays_nobody() -> None:
    async def work(names: Names) -> None:
        names.lookup.answer = None
        with pytest.raises(NameNotFound, match="not resolved within 5 s"):
            await names.find()
        await names.pass_(240)
        # 5 s each, with rests of 2, 4, 8, 16 and then 30 s.
        assert 8 <= len(names.lookup.asked) <= 11
        names.lookup.answer = ["192.0.2.9"]
        assert await names.find("other") == ["192.0.2.9"]

    by_hand(work)


def test_a_name_that_is_not_there_yet_is_asked_every_second() -> None:
    async def work(names: Names) -> None:
        answers: tuple[Exception | list[str], ...] = (NOT_FOUND, [])
        for answer in answers:
            names.lookup.answer = answer
            with pytest.raises(NameNotFound, match=r"its name leads to no address \((domain name not found|no data)\)"):
                await names.find()
        names.lookup.answer = ["192.0.2.1"]
        await names.pass_(1.5)
        assert await names.find() == ["192.0.2.1"]

    by_hand(work)


def test_an_address_is_gone_once_no_answer_has_had_it_for_ten_seconds() -> None:
    async def work(names: Names) -> None:
        told: list[set[tuple[str, str]]] = []
        names.resolver.on_gone = lambda: told.append(set(names.resolver.gone))
        await names.find()
        # A server that gives others of many by turns moves nobody.
        for number in range(6):
            names.lookup.answer = [f"192.0.2.{1 + number % 2}"]
            await names.pass_(5)
        assert told == []
        names.lookup.answer = ["192.0.2.2"]
        await names.pass_(16)
        assert told == [{("vllm", "192.0.2.1")}]
        names.lookup.answer = ["192.0.2.1"]
        await names.pass_(5.5)
        assert names.resolver.gone == set()

    by_hand(work)


def asking(port: int, monkeypatch: pytest.MonkeyPatch) -> SystemLookup:
    """c-ares, of the name server at this port."""
    monkeypatch.setattr(aiodns, "DNSResolver", partial(aiodns.DNSResolver, nameservers=[f"127.0.0.1:{port}"]))
    return SystemLookup()


def test_c_ares_asks_as_is_expected_and_a_name_that_hangs_holds_up_no_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_PATIENCE", 0.5)

    async def work() -> None:
        async with name_server({b"vllm.example": "127.0.0.5"}) as port:
            asks = asking(port, monkeypatch)
            names = Resolver(asks)
            hanging = [asyncio.create_task(names.addresses(f"hangs-{number}.example", 80)) for number in range(20)]
            try:
                assert (await names.addresses("vllm.example", 8008))[0][4] == ("127.0.0.5", 8008)
                assert {one[4][0] for one in await names.addresses("localhost", 1)} & {"127.0.0.1", "::1"}
                with pytest.raises(NameNotFound, match="domain name not found"):
                    await names.addresses("nobody.example", 80)
                for one in await asyncio.gather(*hanging, return_exceptions=True):
                    assert isinstance(one, NameNotFound)
            finally:
                await names.close()

    run(work())


def test_what_asks_is_made_where_a_host_is_a_name() -> None:
    async def work() -> None:
        assert system_lookup(["192.0.2.1", "::1"]) is None
        lookup = system_lookup(["192.0.2.1", "vllm"])
        assert isinstance(lookup, SystemLookup)
        await lookup.close()

    uvloop.run(work())


def test_an_answer_holds_for_half_a_second_whatever_it_says_of_itself(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without addresses, too, as of a Service none of whose pods is ready."""

    async def work() -> None:
        addresses = {b"vllm.example": ""}
        async with name_server(addresses, ttl=3600) as port:
            asks = asking(port, monkeypatch)
            for address in ("", "127.0.0.5", "127.0.0.6", ""):
                addresses[b"vllm.example"] = address
                async with asyncio.timeout(10):
                    while await found(asks, "vllm.example") != address:  # noqa: ASYNC110 - what changes is elsewhere
                        await asyncio.sleep(0.05)
            await asks.close()

    run(work())


async def found(lookup: SystemLookup, host: str) -> str:
    try:
        return "".join(await lookup.find(host, socket.AF_INET))
    except aiodns.error.DNSError:
        return ""


def test_a_changed_resolv_conf_is_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what reads it is made anew, and only then."""

    async def work() -> None:
        lookup = SystemLookup()
        seen = []
        for cached in (3600, 3600, 0):
            monkeypatch.setattr(resolver, "_CACHED", cached)
            await lookup.find("127.0.0.1", socket.AF_UNSPEC)
            seen.append(lookup._resolver)
        assert seen[0] is seen[1]
        assert seen[1] is not seen[2]
        await lookup.close()

    run(work())

"""Tokens: how they are asked for, what is made of every answer, and when they are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import orjson
import pytest

from gateway.upstream import credentials as module
from gateway.upstream.connections import ConnectionLimits, ConnectionPool
from gateway.upstream.credentials import ClientCredentials, TokenClient
from gateway.upstream.httpx_transport import UpstreamTransport
from gateway.upstream.resolver import Resolver
from gateway.wire.errors import GatewayError, NoneReady, UpstreamUnauthorized
from tests.support.fake_vllm import Hold, Step, response
from tests.support.ports import free_port
from tests.support.token_server import CLIENT, SECRET, TokenServer, asked_by

NO_LIVES: list[Any] = [None, 0, -1, "soon", [], {}, float("nan")]
GOOD = {"access_token": "t", "token_type": "Bearer", "expires_in": 3600}


def answers(status: str = "200 OK", **changed: Any) -> list[Step]:
    """A script: an answer with these fields changed, None leaves one out."""
    fields = {name: value for name, value in {**GOOD, **changed}.items() if value is not None}
    return [response(status, orjson.dumps(fields))]


@contextlib.asynccontextmanager
async def credentials(url: str) -> AsyncIterator[ClientCredentials]:
    limits = ConnectionLimits(connect_timeout=5, max_age=60, max_requests=100, keepalive=60)
    connections = ConnectionPool(limits, Resolver())
    try:
        yield ClientCredentials(TokenClient(url, CLIENT, SECRET), UpstreamTransport(connections))
    finally:
        await connections.close()


@contextlib.asynccontextmanager
async def fetched(server: TokenServer) -> AsyncIterator[ClientCredentials]:
    async with credentials(f"{server.url}/token?tenant=1") as tokens, tokens.renewing():
        yield tokens


async def until(ready: Callable[[], bool]) -> None:
    for _ in range(1000):
        if ready():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


def outcome(server: TokenServer) -> tuple[str | None, str]:
    """What one asking of it comes to."""

    async def ask() -> tuple[str | None, str]:
        async with fetched(server) as tokens:
            return tokens.value, tokens.why

    return asyncio.run(ask())


# How a token is asked for


def test_a_token_is_asked_for_with_basic_as_the_rfc_has_it() -> None:
    with TokenServer() as server:
        assert outcome(server) == ("Bearer token-1", "")
    (request,) = server.received
    assert request.target == "/token?tenant=1"
    assert asked_by(request) == ("basic", CLIENT, SECRET)


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized"])
def test_a_server_that_does_not_take_basic_gets_the_secret_in_the_body_from_then_on(status: str) -> None:
    async def ask(server: TokenServer) -> None:
        async with fetched(server) as tokens:
            assert tokens.value == "Bearer token-1"
            told = asyncio.Event()
            tokens.renew(tokens.value, lambda _: told.set())
            await told.wait()
            assert tokens.value == "Bearer token-2"

    with TokenServer() as server:
        server.queue([response(status, b'{"error":"invalid_client"}')])
        asyncio.run(ask(server))
    assert [asked_by(request)[0] for request in server.received] == ["basic", "body", "body"]
    assert asked_by(server.received[1]) == ("body", CLIENT, SECRET)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (answers(access_token=None), "the token server's answer has no access_token"),
        (answers(access_token=""), "the token server's answer has no access_token"),
        (answers(access_token=7), "the token server's answer has no access_token"),
        (answers(access_token="a b"), "the token server's token has characters that may not stand in a header"),
        (answers(access_token="a\r\nx: y"), "the token server's token has characters that may not stand in a header"),
        (answers(access_token="ä"), "the token server's token has characters that may not stand in a header"),
        (answers(token_type="mac"), "the token server's token_type is not Bearer"),
        (answers(token_type=1), "the token server's token_type is not Bearer"),
        ([response("200 OK", b"<html>")], "the token server's answer is not a JSON object"),
        ([response("200 OK", b"[" * 50_000)], "the token server's answer is not a JSON object"),
        ([response("200 OK", b"")], "the token server's answer is not a JSON object"),
        ([response("200 OK", b" " * 70_000)], "the token server's answer is larger than 65536 bytes"),
        ([response("500 Internal Server Error", b"oops")], "the token server answers 500"),
        ([response("302 Found", b"", "location: /other")], "the token server answers 302"),
        ([response("403 Forbidden", b'{"error":"invalid_scope"}')], "the token server answers 403 invalid_scope"),
        ([response("403 Forbidden", b'{"error":"s3cret+/%= x"}')], "the token server answers 403"),
        ([response("403 Forbidden", b'{"error":["a"]}')], "the token server answers 403"),
        (["reset"], "the token server's answer broke off (it reset the connection)"),
        (["close"], "the token server's answer broke off (it closed the connection)"),
        (
            [b"HTTQ/1.1 200 OK\r\n\r\n"],
            "the token server's answer broke off (its answer is not HTTP (Expected HTTP/, RTSP/ or ICE/))",
        ),
    ],
)
def test_what_is_wrong_with_the_token_servers_answer_is_told(script: list[Any], why: str) -> None:
    with TokenServer() as server:
        server.queue(script)
        assert outcome(server) == (None, why)


def test_a_client_that_the_token_server_does_not_know_is_told_of() -> None:
    with TokenServer() as server:
        server.queue(*[[response("401 Unauthorized", b'{"error":"invalid_client"}')]] * 2)
        assert outcome(server) == (None, "the token server answers 401 invalid_client")


def test_a_token_server_that_is_slow_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with TokenServer() as server:
        drips: list[Step] = [b"x: y\r\n", 0.1]
        server.queue([b"HTTP/1.1 200 OK\r\n", *drips * 600])
        assert outcome(server) == (None, "the token server gave no answer within 0.2 s")


def test_a_fault_of_our_own_is_not_the_end_of_all_renewals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(content: bytes) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    async def ask(server: TokenServer) -> None:
        async with fetched(server) as tokens:
            assert tokens.value is None
            await until(lambda: tokens.value == "Bearer token-2")

    monkeypatch.setattr(module, "_token_in", fail)
    with TokenServer() as server:
        asyncio.run(ask(server))
    assert "no token for the upstreams could be fetched" in caplog.text


# When it is renewed


@pytest.mark.parametrize(
    ("said", "life"),
    [
        (3600, 3600),
        ("3600", 3600),
        (0.5, 0.5),
        (1e300, 365 * 86400),
        *[(said, math.inf) for said in NO_LIVES],
    ],
)
def test_how_long_a_token_lives(said: Any, life: float) -> None:
    assert module._life(said) == life


def test_a_token_is_renewed_ahead_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(server: TokenServer) -> None:
        async with fetched(server) as tokens:
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert tokens.value == "Bearer token-1"
            await until(lambda: tokens.value != "Bearer token-1")
            assert tokens.value == "Bearer token-2"
            assert 0.9 < loop.time() - began < 9

    monkeypatch.setattr(module, "_RENEWED_AFTER", (0.1, 0.1))
    with TokenServer() as server:
        server.life = 10
        asyncio.run(ask(server))


def test_a_token_is_kept_for_as_long_as_it_lives_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_RENEWED_AFTER", (0.5, 0.5))
    failure = response("500 Internal Server Error", b"")

    async def ask(server: TokenServer) -> None:
        async with fetched(server) as tokens:
            await asyncio.to_thread(server.wait_for_request, 2)
            assert tokens.value == "Bearer token-1"
            await until(lambda: tokens.value is None)
            await until(lambda: tokens.value == "Bearer token-2")

    with TokenServer() as server:
        server.life = 2
        server.queue([server.token()], *[[failure]] * 2)
        asyncio.run(ask(server))
    said = [record.message for record in caplog.records if record.name == module.__name__]
    assert said == [
        f"a token for the upstreams was fetched from {server.url}/token?tenant=1",
        f"no token for the upstreams from {server.url}/token?tenant=1: the token server answers 500",
        "the token for the upstreams has run out: calls are refused until there is another one",
        f"a token for the upstreams was fetched from {server.url}/token?tenant=1",
    ]


def test_a_token_server_that_is_down_is_asked_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", (0.02, 0.08))
    times: list[float] = []

    async def ask() -> None:
        async with credentials(f"http://127.0.0.1:{free_port()}/token") as tokens:
            fetch = tokens._fetch

            async def counted() -> tuple[str, float]:
                times.append(asyncio.get_running_loop().time())
                return await fetch()

            monkeypatch.setattr(tokens, "_fetch", counted)
            async with tokens.renewing():
                assert tokens.why == "the token server cannot be reached (connection refused)"
                await until(lambda: len(times) >= 7)
                assert tokens.value is None

    asyncio.run(ask())
    least = [0.01, 0.02, 0.04, 0.04, 0.04, 0.04]
    assert all(after - before >= pause for (before, after), pause in zip(pairwise(times), least, strict=False))


# What one refuses


def test_many_refusals_of_one_token_are_one_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(server: TokenServer, hold: Hold) -> None:
        async with fetched(server) as tokens:
            told: list[GatewayError | None] = []
            for _ in range(10):
                assert tokens.renew("Bearer token-1", told.append)
            await asyncio.to_thread(server.wait_for_request, 2)
            for _ in range(10):
                assert tokens.renew("Bearer token-1", told.append)
            assert told == []
            hold.release()
            await until(lambda: len(told) == 20)
            # Of the one before, and of this one.
            tokens.renew("Bearer token-1", told.append)
            assert told == [None] * 21
            tokens.renew("Bearer token-2", told.append)
            assert isinstance(told[-1], UpstreamUnauthorized)
            assert len(server.received) == 2
            monkeypatch.setattr(module, "_AGAIN_AFTER", 0)
            tokens.renew("Bearer token-2", told.append)
            await until(lambda: tokens.value == "Bearer token-3")

    with TokenServer() as server:
        hold = Hold()
        server.queue([server.token()], [hold, server.token()])
        asyncio.run(ask(server, hold))
    assert len(server.received) == 3


def test_a_refused_token_stays_where_there_is_no_new_one_and_the_server_is_left_alone() -> None:
    async def ask(server: TokenServer) -> None:
        async with fetched(server) as tokens:
            told: list[GatewayError | None] = []
            tokens.renew("Bearer token-1", told.append)
            await until(lambda: bool(told))
            asked = len(server.received)
            for _ in range(100):
                tokens.renew("Bearer token-1", told.append)
            assert [type(error) for error in told] == [NoneReady] * 101
            assert tokens.value == "Bearer token-1"
            assert len(server.received) == asked

    with TokenServer() as server:
        server.queue([server.token()], *[[response("503 Service Unavailable", b"")]] * 9)
        asyncio.run(ask(server))


def test_a_secret_is_in_no_repr() -> None:
    assert SECRET not in repr(TokenClient("https://login.example.com/token", CLIENT, SECRET))

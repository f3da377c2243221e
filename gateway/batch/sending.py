"""Sends a batch's requests, many at a time, and each again for as long as that may help."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import random
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import orjson

from gateway.batch.output_file import result_of
from gateway.batch.request import Request
from gateway.upstream.connect_errors import describe_error
from gateway.wire import sse

# What may be otherwise in a while; no other 4xx is ever asked twice.
_TOO_MANY = 429
_AGAIN = frozenset({_TOO_MANY, 502, 503, 504})
# Some four minutes, in which a model server starts anew.
_TRIES = 10
# Of what the gateway says not to repeat, as the model has worked on it until a time limit.
_TRIES_AT_WORK = 2
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LONGEST_RETRY_AFTER = 600.0
# Bytes of requests that are held: a few long ones are enough.
_MOST_HELD = 64 * 1024 * 1024
_CONNECT_SECONDS = 5
_BROKEN = "broken_stream"
# An error in the style `answer_part`, which no text can hold: its quotes are escaped.
_STYLED_ERROR = b'data: {"type":"error"'
# Less than the five seconds for which a gateway keeps a connection.
_IDLE_SECONDS = 3
# Who is gone without a word is missed after two minutes.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Unreachable(Exception):
    """Nothing answers there; the text says why."""


class Refused(Exception):
    """The gateway takes no request of ours; the text is a sentence."""


class _Left(Exception):
    """A request that is not asked again, as the batch ends; it is the next one's."""


@dataclass
class Figures:
    """How far it is: requests in all, those answered before and now, and those that failed, by why.

    `waiting` are asked again in a while, the last of them for the reason `why`.
    """

    total: int
    before: int
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    why: str = ""

    @property
    def done(self) -> int:
        """All that have a result."""
        return self.before + self.answered + self.failed.total()


class Clients:
    """A client of one connection for each call that runs: httpx's pools look at all of their connections each time."""

    def __init__(self, key: str | None, *, tls: bool) -> None:
        # To read all of the system's certificates takes a while.
        self._tls = ssl.create_default_context() if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._idle: list[httpx.AsyncClient] = []
        self._all = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._all.aclose()

    @contextlib.contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """One that nobody else has meanwhile. It waits for an answer for as long as the gateway does."""
        client = self._idle.pop() if self._idle else self._new()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new(self) -> httpx.AsyncClient:
        options: list[Any] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for name, value in _KEEPALIVE.items():
            if (option := getattr(socket, name, None)) is not None:  # Linux has them all
                options.append((socket.IPPROTO_TCP, option, value))
        limits = httpx.Limits(max_connections=1, keepalive_expiry=_IDLE_SECONDS)
        client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                verify=self._tls, trust_env=False, limits=limits, socket_options=options
            ),
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            # No proxy that is set for downloads gets prompts or a key, and no redirect is followed.
            trust_env=False,
        )
        self._all.push_async_callback(client.aclose)
        return client


class Sender:
    """One run of a batch, against the gateway at `url`; results go to `write`."""

    def __init__(self, clients: Clients, url: str, write: Callable[[bytes], None], figures: Figures) -> None:
        self._clients = clients
        self._url = url
        self._write = write
        self._figures = figures
        self._stopping = asyncio.Event()
        self._reached = False
        self._failure: Refused | Unreachable | None = None

    def stop(self) -> None:
        """Begin nothing more, but let end what runs."""
        self._stopping.set()

    async def send(self, requests: Iterable[Request], most: int) -> None:
        """Send all of them, at most `most` at a time, and write each result as it comes.

        Raises Refused or Unreachable once those that run have ended, and at once what `requests` and `write` raise.
        """
        running: dict[asyncio.Task[None], int] = {}
        try:
            for request in requests:
                size = len(request.content)
                while running and (len(running) >= most or sum(running.values()) + size > _MOST_HELD):
                    await self._one_has_ended(running)
                if self._stopping.is_set():
                    break
                running[asyncio.create_task(self._handle(request))] = size
            while running:
                await self._one_has_ended(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self._failure:
            raise self._failure

    async def _one_has_ended(self, running: dict[asyncio.Task[None], int]) -> None:
        ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            del running[task]
            try:
                task.result()
            except (Refused, Unreachable) as error:
                self._failure = self._failure or error
                self.stop()

    async def _handle(self, request: Request) -> None:
        with contextlib.suppress(_Left):
            result, failure = await self._ask(request)
            self._write(result)
            if failure:
                self._figures.failed[failure] += 1
            else:
                self._figures.answered += 1

    async def _ask(self, request: Request) -> tuple[bytes, str]:
        """The result of a request, and why it failed, if it did. Raises Refused, Unreachable, _Left."""
        figures = self._figures
        before = answered = figures.answered
        tries = 0
        while True:
            got = await self._ask_once(request)
            if isinstance(got, httpx.Response) and got.status_code not in _AGAIN:
                return _result(request, got), _failure(got)
            # No room is no fault of this one's, for as long as there is some for others.
            if not (_has_no_room(got) and figures.answered > answered):
                tries += 1
            answered = figures.answered
            if tries >= _most_tries(got):
                if self._is_gone(got) and figures.answered == before:
                    raise Unreachable(_why(got))
                result = _no_answer(request, got, tries) if isinstance(got, httpx.HTTPError) else _result(request, got)
                return result, _why(got)
            await self._wait(_seconds(got, tries), _why(got))

    async def _ask_once(self, request: Request) -> httpx.Response | httpx.HTTPError:
        """The answer, or why there is none. Raises Refused, and Unreachable where there never was one."""
        headers = {"content-type": request.kind} if request.kind else None
        try:
            with self._clients.one() as client:
                got = await client.request(
                    request.method, self._url + request.path, content=request.content or None, headers=headers
                )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not self._reached:
                raise Unreachable(_why(error)) from None
            return error
        except httpx.HTTPError as error:
            return error
        self._reached = True
        self._check(got)
        return got

    def _is_gone(self, got: httpx.Response | httpx.HTTPError) -> bool:
        """Whether it is no gateway's answer, or lack of one, to a request."""
        if isinstance(got, httpx.Response):
            return False
        return not self._reached or isinstance(got, httpx.ConnectError | httpx.ConnectTimeout)

    def _check(self, got: httpx.Response) -> None:
        """Raises Refused for what all others would be answered, too."""
        if got.status_code == httpx.codes.UNAUTHORIZED:
            raise Refused(_message(got) or "The gateway refuses the key.")
        if got.is_redirect:
            raise Refused(
                f"{self._url} redirects to {ascii(got.headers.get('location', ''))[:200]}, where nothing is sent: name "
                "the gateway itself with --url."
            )

    async def _wait(self, seconds: float, why: str) -> None:
        """Raises _Left where the batch is to end."""
        self._figures.waiting += 1
        self._figures.why = why
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
        finally:
            self._figures.waiting -= 1
        raise _Left


def _why(got: httpx.Response | httpx.HTTPError) -> str:
    """An answer's status, or what the system says."""
    if isinstance(got, httpx.Response):
        return str(got.status_code)
    return "it broke off" if isinstance(got, httpx.RemoteProtocolError) else describe_error(got)


def _has_no_room(got: httpx.Response | httpx.HTTPError) -> bool:
    return isinstance(got, httpx.Response) and got.status_code == _TOO_MANY


def _most_tries(got: httpx.Response | httpx.HTTPError) -> int:
    worked = isinstance(got, httpx.Response) and got.headers.get("x-should-retry") == "false"
    return _TRIES_AT_WORK if worked else _TRIES


def _seconds(got: httpx.Response | httpx.HTTPError, tries: int) -> float:
    """How long to wait now, which is never the same for two."""
    asked = _retry_after(got.headers.get("retry-after")) if isinstance(got, httpx.Response) else 0
    # Who has no room knows when there is some; others only hope.
    known = asked and _has_no_room(got)
    least = asked if known else max(asked, min(_LONGEST_WAIT / 2, _FIRST_WAIT * 2 ** max(0, tries - 1)))
    return random.uniform(least, 2 * least)


def _no_answer(request: Request, error: httpx.HTTPError, tries: int) -> bytes:
    told = {"code": "no_answer", "message": f"There was no answer in {tries} tries: {_why(error)}."}
    return result_of(request.custom_id, response=None, error=told)


def _result(request: Request, got: httpx.Response) -> bytes:
    told = {"status_code": got.status_code, "request_id": got.headers.get("x-request-id"), "body": _body(got)}
    error = {"code": _BROKEN, "message": "The answer is a stream that ends with an error."}
    return result_of(request.custom_id, response=told, error=error if _failure(got) == _BROKEN else None)


def _failure(got: httpx.Response) -> str:
    """Why an answer is none; empty where it is one."""
    if not got.is_success:
        return _why(got)
    # One route answers in streams alone, which say at their end that they broke.
    streamed = got.headers.get("content-type", "").startswith("text/event-stream")
    return _BROKEN if streamed and (sse.has_error(got.content) or _STYLED_ERROR in got.content) else ""


def _body(got: httpx.Response) -> Any:
    """JSON as such, any other text as text, and what is no text in base64."""
    try:
        return orjson.loads(got.content)
    except orjson.JSONDecodeError:
        pass
    try:
        return got.content.decode()
    except UnicodeDecodeError:
        return base64.b64encode(got.content).decode()


def _message(got: httpx.Response) -> str:
    body = _body(got)
    try:
        return str(body["error"]["message"])
    except (LookupError, TypeError):
        return ""


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or a date (RFC 9110, 10.2.3); 0 where nothing is said."""
    if value is None:
        return 0
    if re.fullmatch(r"\d{1,9}", value):
        return min(float(value), _LONGEST_RETRY_AFTER)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0
    return min(max(0.0, date.timestamp() - time.time()), _LONGEST_RETRY_AFTER)

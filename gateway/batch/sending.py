"""Sends a batch's requests, many at a time, and retries each while a retry may help."""

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

# Statuses worth a retry; a request with any other 4xx is never sent twice.
_TOO_MANY = 429
_AGAIN = frozenset({_TOO_MANY, 502, 503, 504})
# These tries take some four minutes, enough for a restart of the model server.
_TRIES = 10
# For requests that the gateway says not to retry, because the model has worked on them until a timeout.
_TRIES_AT_WORK = 2
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LONGEST_RETRY_AFTER = 600.0
# Limit for the bytes of requests in flight: of long requests, a few at a time are enough.
_MOST_HELD = 64 * 1024 * 1024
_CONNECT_SECONDS = 5
_BROKEN = "broken_stream"
# The beginning of an error in the style `answer_part`; no text can contain it, because quotes in a text are escaped.
_STYLED_ERROR = b'data: {"type":"error"'
# Less than the five seconds for which a gateway keeps an idle connection.
_IDLE_SECONDS = 3
# A peer that vanishes without a FIN or RST is detected after two minutes.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Unreachable(Exception):
    """The gateway cannot be reached; the text says why."""


class Refused(Exception):
    """The gateway refuses all our requests; the text is a sentence."""


class _Left(Exception):
    """A request is not retried, because the batch is ending; the next `batch` sends it."""


@dataclass
class Figures:
    """The progress: all requests, the ones answered by earlier runs and by this run, and the failures by reason.

    `waiting` counts the requests that wait for a retry; `why` is the reason of the latest.
    """

    total: int
    before: int
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    why: str = ""

    @property
    def done(self) -> int:
        """The number of requests that have a result."""
        return self.before + self.answered + self.failed.total()


class Clients:
    """One client with one connection per running call, because an httpx pool scans all its connections on each call."""

    def __init__(self, key: str | None, *, tls: bool) -> None:
        # Only for https: reading all of the system's certificates takes a while.
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
        """A client for exclusive use. It has no read timeout, because the gateway enforces its own."""
        client = self._idle.pop() if self._idle else self._new()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new(self) -> httpx.AsyncClient:
        options: list[Any] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for name, value in _KEEPALIVE.items():
            if (option := getattr(socket, name, None)) is not None:  # Linux has all three
                options.append((socket.IPPROTO_TCP, option, value))
        limits = httpx.Limits(max_connections=1, keepalive_expiry=_IDLE_SECONDS)
        client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                verify=self._tls, trust_env=False, limits=limits, socket_options=options
            ),
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            # A proxy that is set for downloads must not get prompts or a key. Redirects are not followed.
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
        """Start no more requests, but let the running ones finish."""
        self._stopping.set()

    async def send(self, requests: Iterable[Request], most: int) -> None:
        """Send all requests, at most `most` at a time, and write each result as it comes.

        Raises Refused or Unreachable after the running requests have ended. An exception of `requests` or `write` is
        raised at once.
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
        """The result of a request, and the reason if it failed, else "". Raises Refused, Unreachable, _Left."""
        figures = self._figures
        before = answered = figures.answered
        tries = 0
        while True:
            got = await self._ask_once(request)
            if isinstance(got, httpx.Response) and got.status_code not in _AGAIN:
                return _result(request, got), _failure(got)
            # A 429 does not count as a try while the gateway answers other requests.
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
        """The response, or the error instead. Raises Refused, and Unreachable if the gateway was never reached."""
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
        """Whether the gateway itself is unreachable, rather than one request without an answer."""
        if isinstance(got, httpx.Response):
            return False
        return not self._reached or isinstance(got, httpx.ConnectError | httpx.ConnectTimeout)

    def _check(self, got: httpx.Response) -> None:
        """Raise Refused for a response that all other requests would get, too."""
        if got.status_code == httpx.codes.UNAUTHORIZED:
            raise Refused(_message(got) or "The gateway refuses the key.")
        if got.is_redirect:
            raise Refused(
                f"{self._url} redirects to {ascii(got.headers.get('location', ''))[:200]}, where nothing is sent: name "
                "the gateway itself with --url."
            )

    async def _wait(self, seconds: float, why: str) -> None:
        """Wait before a retry. Raises _Left if the batch is ending."""
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
    """The reason of a failure: the response's status, or the system's error text."""
    if isinstance(got, httpx.Response):
        return str(got.status_code)
    return "it broke off" if isinstance(got, httpx.RemoteProtocolError) else describe_error(got)


def _has_no_room(got: httpx.Response | httpx.HTTPError) -> bool:
    return isinstance(got, httpx.Response) and got.status_code == _TOO_MANY


def _most_tries(got: httpx.Response | httpx.HTTPError) -> int:
    worked = isinstance(got, httpx.Response) and got.headers.get("x-should-retry") == "false"
    return _TRIES_AT_WORK if worked else _TRIES


def _seconds(got: httpx.Response | httpx.HTTPError, tries: int) -> float:
    """Seconds to wait before the next try, random, so never the same for two requests."""
    asked = _retry_after(got.headers.get("retry-after")) if isinstance(got, httpx.Response) else 0
    # With a 429 the gateway knows when it has room; any other Retry-After is a guess, so wait at least the backoff.
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
    """The reason why a response is a failure; empty if it is an answer."""
    if not got.is_success:
        return _why(got)
    # One route answers only with streams, and a broken stream ends with an error event.
    streamed = got.headers.get("content-type", "").startswith("text/event-stream")
    return _BROKEN if streamed and (sse.has_error(got.content) or _STYLED_ERROR in got.content) else ""


def _body(got: httpx.Response) -> Any:
    """The body: JSON parsed, any other text as text, and binary data in base64."""
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
    """Seconds from a number or a date (RFC 9110, 10.2.3); 0 if there is no valid value."""
    if value is None:
        return 0
    if re.fullmatch(r"\d{1,9}", value):
        return min(float(value), _LONGEST_RETRY_AFTER)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0
    return min(max(0.0, date.timestamp() - time.time()), _LONGEST_RETRY_AFTER)

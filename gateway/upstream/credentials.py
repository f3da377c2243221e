"""The upstreams' credentials: a fixed key, or OAuth tokens, renewed before they expire and when one is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_plus

import httpx
import orjson

from gateway.pool.upstream_pool import Upstream
from gateway.wire.errors import GatewayError, NoneReady, UpstreamUnauthorized

_log = logging.getLogger(__name__)

# The timeout of all requests for one token, in seconds, and the size limit of a response, in bytes.
_PATIENCE = 5.0
_LARGEST = 64 * 1024
# The part of a token's lifetime after which it is renewed: the rest is a reserve for a token server that is down then.
# The part is random so that gateways that started together do not ask together.
_RENEWED_AFTER = (0.7, 0.8)
_LONGEST_LIFE = 365 * 86400.0
# Backoff between two tries, in seconds: from the first value, doubled up to the last, minus up to half at random.
_BACKOFF = (1.0, 32.0)
# If an upstream refuses every token, a new one is fetched at most once in so many seconds.
_AGAIN_AFTER = 5.0
# How long a start waits for the first token, in seconds.
_EAGER = 1.0


class FixedKey:
    """A key that the operator has set, or none."""

    why = ""
    advice = "set GATEWAY_UPSTREAM_API_KEY to its key"

    value: str | None

    def __init__(self, key: str | None = None) -> None:
        self.replace(key)

    @contextlib.asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """Do nothing: a fixed key is not renewed."""
        yield

    def replace(self, key: str | None) -> None:
        """Use this key from now on."""
        self.value = f"Bearer {key}" if key else ""

    def renew(self, refused: str | None, told: Callable[[GatewayError | None], None]) -> bool:
        """There is no other key: the upstream's refusal is relayed."""
        return False


@dataclass(frozen=True, slots=True)
class TokenClient:
    """The gateway's client credentials at a token server."""

    url: str
    id: str
    secret: str = field(repr=False)


class NoToken(Exception):
    """There is no token; the text says why, without any secret or address."""


class ClientCredentials:
    """Tokens by the client credentials of OAuth (RFC 6749, 4.4).

    `value` is None while there is no token. `why` says why the last try failed, and is empty if it succeeded. One task
    makes all requests, so that no two run at once.
    """

    advice = "GATEWAY_UPSTREAM_TOKEN_URL is to give tokens that it takes"

    def __init__(self, client: TokenClient, transport: httpx.AsyncBaseTransport) -> None:
        """`transport` uses the calls' connections: a proxy that is set for downloads must not see the secret."""
        self.value: str | None = None
        self.why = "the token server has not answered yet"
        self._as = client
        # RFC 6749, 2.3.1: a server must accept Basic. The replaced systems sent the credentials in the body, and some
        # servers accept only that. The way that last gave a token is tried first.
        self._in_body = False
        self._server = Upstream.from_url(client.url)
        self._client = httpx.AsyncClient(transport=transport)
        self._waiting: list[Callable[[GatewayError | None], None]] = []
        self._wanted = asyncio.Event()
        self._asked_once = asyncio.Event()
        self._asking = False
        self._refused_at = -math.inf
        self._fresh_for: float | None = None
        self._end: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """Renew tokens within the context; it begins after the first request for a token, or after one second."""
        task = asyncio.create_task(self._renew_again_and_again())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EAGER):
                    await self._asked_once.wait()
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._end is not None:
                self._end.cancel()

    def replace(self, client: TokenClient) -> None:
        """Use these credentials from now on; fetch a token at once and keep the old one until the new one arrives."""
        if client != self._as:
            self._as = client
            self._wanted.set()

    def renew(self, refused: str | None, told: Callable[[GatewayError | None], None]) -> bool:
        """An upstream refused this value: call `told`, now or later, with None once there is another token.

        `told` gets an error if there is no token, or if the refused token was itself fetched after a refusal.
        """
        if self.value is None:
            told(NoneReady("The gateway has no token for the model server now: try again soon."))
        elif self.value != refused:
            told(None)
        elif self._waiting or self._asking:
            self._waiting.append(told)
        elif (now := time.monotonic()) - self._refused_at >= _AGAIN_AFTER:
            _log.warning("an upstream refuses the gateway's token: another one is fetched")
            self._refused_at = now
            self._waiting.append(told)
            self._wanted.set()
        else:
            told(self._error() or UpstreamUnauthorized())
        return True

    def _error(self) -> GatewayError | None:
        if not self.why:
            return None
        return NoneReady("The model server refuses the gateway's token, and there is no new one yet: try again soon.")

    async def _renew_again_and_again(self) -> None:
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            self._asking = True
            await self._renew()
            self._asking = False
            self._asked_once.set()
            waiting, self._waiting = self._waiting, []
            for told in waiting:
                loop.call_soon(told, self._error())  # a failing callback must not end this task
            if self.why:
                first, last = _BACKOFF
                pause: float | None = min(last, first * 2 ** min(tries, 16)) * random.uniform(0.5, 1)
                tries += 1
            else:
                pause, tries = self._fresh_for, 0
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wanted.wait()

    async def _renew(self) -> None:
        """Request a token once; without a new one the old one stays until it expires."""
        began, before = time.monotonic(), self.why
        try:
            token, life = await self._fetch()
        except NoToken as error:
            self.why = str(error)
            if self.why != before:
                _log.warning("no token for the upstreams from %s: %s", self._as.url, self.why)
            return
        except Exception:
            # A bug in the gateway, which must not end all renewals.
            self.why = "the gateway failed; its log says why"
            _log.exception("no token for the upstreams could be fetched")
            return
        self.value, self.why = f"Bearer {token}", ""
        if before:
            _log.info("a token for the upstreams was fetched from %s", self._as.url)
        if self._end is not None:
            self._end.cancel()
        self._end = self._fresh_for = None
        if life != math.inf:
            self._fresh_for = max(1.0, life * random.uniform(*_RENEWED_AFTER))
            left = life - (time.monotonic() - began)
            self._end = asyncio.get_running_loop().call_later(max(0.0, left), self._run_out)

    def _run_out(self) -> None:
        self.value, self._end = None, None
        self.why = self.why or "the last token has run out"
        _log.warning("the token for the upstreams has run out: calls are refused until there is another one")

    async def _fetch(self) -> tuple[str, float]:
        """Fetch a token and its lifetime in seconds; raises NoToken."""
        try:
            async with asyncio.timeout(_PATIENCE):
                status, content = await self._ask(in_body=self._in_body)
                if status in (400, 401):
                    other = await self._ask(in_body=not self._in_body)
                    if other[0] == 200:
                        self._in_body = not self._in_body
                        status, content = other
        except TimeoutError:
            raise NoToken(f"the token server gave no answer within {_PATIENCE:g} s") from None
        except httpx.ConnectError as error:
            raise NoToken(f"the token server cannot be reached ({error})") from None
        except httpx.RemoteProtocolError as error:
            raise NoToken(f"the token server's answer broke off ({error})") from None
        if status != 200:
            raise NoToken(f"the token server answers {status}{_code_in(content)}")
        return _token_in(content)

    async def _ask(self, *, in_body: bool) -> tuple[int, bytes]:
        form = {"grant_type": "client_credentials"}
        # RFC 6749, 2.3.1: id and secret are form-encoded before they become Basic's user and password.
        auth = httpx.BasicAuth(quote_plus(self._as.id), quote_plus(self._as.secret))
        if in_body:
            form |= {"client_id": self._as.id, "client_secret": self._as.secret}
        # Not compressed: a few compressed bytes may expand to very many.
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        to_server = {"upstream": self._server}
        request = self._client.build_request("POST", self._as.url, data=form, headers=headers, extensions=to_server)
        answer = await self._client.send(request, auth=None if in_body else auth)
        if len(answer.content) > _LARGEST:
            raise NoToken(f"the token server's answer is larger than {_LARGEST} bytes")
        return answer.status_code, answer.content


def _read(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return None


def _code_in(content: bytes) -> str:
    """The error code of RFC 6749 (5.2), without the description, which may repeat the request."""
    answer = _read(content)
    code = answer.get("error") if isinstance(answer, dict) else None
    return f" {code}" if code in _CODES else ""


_CODES = (
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
)


def _token_in(content: bytes) -> tuple[str, float]:
    answer = _read(content)
    if not isinstance(answer, dict):
        raise NoToken("the token server's answer is not a JSON object")
    token, kind = answer.get("access_token"), answer.get("token_type", "Bearer")
    if not isinstance(token, str) or not token:
        raise NoToken("the token server's answer has no access_token")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise NoToken("the token server's token_type is not Bearer")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise NoToken("the token server's token has characters that may not stand in a header")
    return token, _life(answer.get("expires_in"))


def _life(said: Any) -> float:
    """Token lifetime in seconds; infinite if the server does not state one."""
    try:
        seconds = float(said)
    except (TypeError, ValueError):
        return math.inf
    return min(seconds, _LONGEST_LIFE) if seconds > 0 else math.inf

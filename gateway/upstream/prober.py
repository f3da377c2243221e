"""Probes of the upstreams, and whether a chat call would succeed now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

import httpx

from gateway.pool.upstream_pool import State, Upstream, UpstreamPool
from gateway.upstream.connect_errors import REFUSED, describe_error
from gateway.upstream.credentials import ClientCredentials, FixedKey

_log = logging.getLogger(__name__)

# Between two probes of an upstream that does not serve, and for one answer, in seconds.
_EAGER = 1.0
_PATIENCE = 5.0


class _UpstreamAuth(httpx.Auth):
    """What the upstreams are shown, as it is now; what one refuses is renewed, and it is asked once more."""

    def __init__(self, credentials: FixedKey | ClientCredentials) -> None:
        self._credentials = credentials

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        shown = self._credentials.value
        if shown:
            request.headers["authorization"] = shown
        answer = yield request
        renewed = asyncio.Event()
        if answer.status_code == 401 and self._credentials.renew(shown, lambda _: renewed.set()):
            await renewed.wait()
            if self._credentials.value not in (None, shown):
                request.headers["authorization"] = self._credentials.value
                yield request


class Prober:
    """Asks each upstream how it is, without ever making it generate a token."""

    def __init__(
        self,
        pool: UpstreamPool,
        *,
        probe_interval: float,
        model: str | None,
        system_role: Literal["system", "merge"],
        credentials: FixedKey | ClientCredentials,
        tls: ssl.SSLContext | None = None,
        reads_template: bool = True,
        probe_audio: bool = False,
    ) -> None:
        """`model` is the configured one, `probe_interval` the seconds between two probes of one that serves.

        `credentials` are what calls show, too, `tls` says whom to trust. `reads_template` where chats are relayed: a
        model for anything else may have none. `probe_audio` where it matters which upstreams take speech.
        """
        self._pool = pool
        self._probe_interval = probe_interval
        self._model = model
        self._system_role = system_role
        self._reads_template = reads_template
        self._probe_audio = probe_audio
        self._credentials = credentials
        # A proxy set for downloads must not catch a probe.
        self._client = httpx.AsyncClient(
            trust_env=False,
            timeout=_PATIENCE,
            # One that trusts nobody, where there is no TLS, as httpx would read every certificate.
            verify=tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            auth=_UpstreamAuth(credentials),
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._running: dict[Upstream, asyncio.Task[None]] = {}
        # Those of which has been asked what does not change while they run.
        self._known: set[Upstream] = set()

    @contextlib.asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Probe for as long as the context lasts; it begins when all were asked once, or a second has passed."""
        watches = [asyncio.create_task(self._watch(upstream)) for upstream in self._pool]
        try:
            # So that the very first call finds a model, where a model server already runs.
            await self.probe_all()
            yield
        finally:
            tasks = [*watches, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            await self.probe(upstream)
            await asyncio.sleep(
                self._probe_interval if upstream.state == "serving" else min(_EAGER, self._probe_interval)
            )

    async def probe_all(self) -> None:
        """Ask every upstream now; return when all have answered, or after a second: one that hangs is no news."""
        await asyncio.wait([asyncio.create_task(self.probe(upstream)) for upstream in self._pool], timeout=_EAGER)

    async def probe(self, upstream: Upstream) -> None:
        """Ask now; whoever asks while an answer is awaited shares it, so that many askers cost one probe."""
        task = self._running.get(upstream)
        if task is None:
            task = self._running[upstream] = asyncio.create_task(self._probe(upstream))
            task.add_done_callback(lambda _: self._running.pop(upstream, None))
        await asyncio.shield(task)

    async def _probe(self, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                state, why = await self._ask(upstream)
        except (httpx.TimeoutException, TimeoutError):
            state, why = "down", f"no answer within {_PATIENCE:g} s"
        except httpx.ConnectError as error:
            state, why = _unconnected(upstream, describe_error(error))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            state, why = "down", f"its answer broke off ({type(error).__name__})"
        if state != "serving":
            self._known.discard(upstream)
        if (state, why) != (upstream.state, upstream.why):
            level = logging.INFO if state != "down" else logging.WARNING
            _log.log(level, "upstream %s is %s%s", upstream.url, state, f": {why}" if why else "")
            if state == "serving":
                upstream.record_success()  # it is back, and not to be held to what broke before
        upstream.state, upstream.why = state, why

    async def _ask(self, upstream: Upstream) -> tuple[State, str]:
        if self._credentials.value is None:
            return "down", f"there is no token for it: {self._credentials.why}"
        health = await self._client.get(f"{upstream.url}/health")
        if health.status_code != 200:
            return self._unhealthy(upstream, health.status_code)
        models = await self._client.get(f"{upstream.url}/v1/models")
        if models.status_code in (401, 403):
            return "down", f"its /v1/models answers {models.status_code}: {self._credentials.advice}"
        served, upstream.contexts = _models(models)
        if not served:
            return "down", f"its /v1/models answers {models.status_code} and no model list"
        upstream.models = served
        if self._model is not None and self._model not in served:
            return "down", f"it does not serve {self._model!r} (GATEWAY_MODEL); it serves {', '.join(served)}"
        if upstream not in self._known:
            if self._probe_audio:
                upstream.supports_audio = await self._has(upstream, "/v1/audio/transcriptions")
            if self._reads_template:
                why = await self._template_problem(upstream, self._model or served[0])
                if why:
                    return "down", why
            self._known.add(upstream)
        return "serving", ""

    def _unhealthy(self, upstream: Upstream, status: int) -> tuple[State, str]:
        said = f"its /health answers {status}"
        if status in (401, 403):
            return "down", f"{said}: {self._credentials.advice}"
        # vLLM's own 503 means a dead engine; before it ever served, or as 204, it means not yet.
        loading = status == 204 or (status == 503 and not upstream.ever_served)
        return "loading" if loading else "down", said

    async def _has(self, upstream: Upstream, path: str) -> bool:
        """Whether a path that is posted to is there: vLLM has those that its model can answer."""
        return (await self._client.get(f"{upstream.url}{path}")).status_code != 404

    async def _template_problem(self, upstream: Upstream, model: str) -> str:
        """Why the model's chat template would refuse a simplified request; empty where it would not."""
        user = {"role": "user", "content": "Hello."}
        system = [] if self._system_role == "merge" else [{"role": "system", "content": "Be brief."}]
        answer = await self._client.post(f"{upstream.url}/tokenize", json={"model": model, "messages": [*system, user]})
        # Only a refusal says something of the template; a server without this path says nothing.
        if answer.status_code != 400 or not await self._has(upstream, "/v1/chat/completions"):
            return ""
        said = _error_message(answer)
        if not system:
            return f"its chat template refuses a user's message ({said})"
        return (
            f"its chat template refuses a system message ({said}): set GATEWAY_SYSTEM_ROLE=merge, "
            "or give vLLM a --chat-template that takes one"
        )

    async def metrics(self, upstream: Upstream) -> str:
        """What its own `/metrics` says; empty where it says nothing, and where it is gone it is probed at once."""
        if self._credentials.value is None:
            return ""
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._client.get(f"{upstream.url}/metrics")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            await self.probe(upstream)
            return ""
        return answer.text if answer.status_code == 200 else ""

    def report(self, now: float) -> list[dict[str, Any]]:
        """How each upstream is."""
        return [
            {
                "url": upstream.url,
                "state": status[0],
                "why": status[1],
                "models": upstream.models,
                "in_flight": upstream.in_flight,
            }
            for upstream in self._pool
            for status in [upstream.status(now)]
        ]


def _unconnected(upstream: Upstream, why: str) -> tuple[State, str]:
    if why != REFUSED:
        return "down", f"it cannot be reached ({why})"
    if not upstream.ever_served:
        return "loading", "it refuses connections: it has not started yet"
    return "down", "it refuses connections"


def _models(answer: httpx.Response) -> tuple[tuple[str, ...], dict[str, int]]:
    """The models' ids, and the lengths of those that tell it."""
    try:
        models = answer.json()["data"] if answer.status_code == 200 else []
        # Interned, so that no probe makes new ones of what all else holds on to.
        lengths = {sys.intern(str(model["id"])): model.get("max_model_len") for model in models}
        return tuple(lengths), {model: length for model, length in lengths.items() if isinstance(length, int)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return (), {}


def _error_message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:200]
    except (ValueError, LookupError, TypeError):
        return f"status {answer.status_code}"

"""Probes the upstreams and says whether a chat call would succeed now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import httpx
import orjson

from gateway.pool.aliases import Alias
from gateway.pool.upstream_pool import State, Upstream, UpstreamPool
from gateway.upstream import vllm_metrics
from gateway.upstream.connect_errors import REFUSED
from gateway.upstream.credentials import ClientCredentials, FixedKey
from gateway.upstream.vllm_metrics import VllmLoad
from gateway.wire.errors import REDIRECT_ADVICE, is_shortage
from gateway.wire.heads import REDIRECTS

_log = logging.getLogger(__name__)

# The pause between two probes of an upstream that does not serve, and the timeout of a probe, in seconds.
_EAGER = 1.0
_PATIENCE = 5.0
# With more upstreams than the first number each pauses longer: the second number is the most probes begun per second.
_FEW = 8
_A_SECOND = 20
# The shortest pause between two probes that broken calls trigger, in seconds.
_SUSPECTED_AFTER = 0.1
# The model list of a serving upstream is read at every so many probes; with several upstreams also its prefix cache hit
# rate.
_LIST_EVERY = 5
_HITS_EVERY = 15
_HITS_PATIENCE = 1.0


class _UpstreamAuth(httpx.Auth):
    """Adds the current credentials; renews them when an upstream refuses them, and retries once."""

    def __init__(self, credentials: FixedKey | ClientCredentials) -> None:
        self._credentials = credentials

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        own: str | None = request.extensions["upstream"].authorization
        shown = self._credentials.value if own is None else own
        if shown:
            request.headers["authorization"] = shown
        answer = yield request
        renewed = asyncio.Event()
        if own is None and answer.status_code == 401 and self._credentials.renew(shown, lambda _: renewed.set()):
            await renewed.wait()
            if self._credentials.value not in (None, shown):
                request.headers["authorization"] = self._credentials.value
                yield request


class Prober:
    """Probes the state of each upstream, without ever making it generate a token."""

    def __init__(
        self,
        pool: UpstreamPool,
        *,
        probe_interval: float,
        model: str | None,
        system_role: Literal["system", "merge"],
        credentials: FixedKey | ClientCredentials,
        transport: httpx.AsyncBaseTransport,
        reads_template: bool = True,
        probe_audio: bool = False,
        route_paths: Mapping[str, str] = MappingProxyType({}),
        model_aliases: Mapping[str, Alias] = MappingProxyType({}),
    ) -> None:
        """`model` is the configured model, which may be one of `model_aliases`. `probe_interval` is the seconds between
        two probes of an upstream.

        `credentials` and `transport` are those of calls. `reads_template` is true where chats are relayed: a model for
        other tasks may have no template. `probe_audio` is true where it matters which upstreams take speech, and
        `route_paths` (path by route name) is set where it matters which routes each takes.
        """
        self._pool = pool
        self._probe_interval = probe_interval
        self._model = model
        self._model_aliases = model_aliases
        self._system_role = system_role
        self._reads_template = reads_template
        self._probe_audio = probe_audio
        self._route_paths = route_paths
        self._credentials = credentials
        self._client = httpx.AsyncClient(
            transport=transport,
            trust_env=False,
            headers={"accept-encoding": "identity"},
            auth=_UpstreamAuth(credentials),
        )
        self._probes: Counter[Upstream] = Counter()
        self._loads: dict[Upstream, VllmLoad] = {}
        # Upstreams with a broken call, until they are probed.
        self._suspected: dict[Upstream, asyncio.TimerHandle] = {}
        self._running: dict[Upstream, asyncio.Task[None]] = {}
        self._probing = False
        self._watches: dict[Upstream, asyncio.Task[None]] = {}
        # Upstreams whose constant properties were read; these do not change while an upstream runs.
        self._known: set[Upstream] = set()

    @contextlib.asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Probe within the context; it begins after the first probe of all upstreams, or after one second."""
        self._probing = True
        self.follow(self._pool, ())
        try:
            # The very first call then finds a model if a model server already runs.
            await self.probe_all()
            yield
        finally:
            tasks = [*self._watches.values(), *self._running.values()]
            self.follow((), [*self._watches])
            self._probing = False
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

    def follow(self, came: Iterable[Upstream], gone: Iterable[Upstream]) -> None:
        """Start probing the new upstreams and stop probing the removed ones, if probing has begun."""
        if not self._probing:
            return
        for upstream in came:
            upstream.on_failure = self._broke
            self._watches[upstream] = asyncio.create_task(self._watch(upstream))
        for upstream in gone:
            upstream.on_failure = None
            self._watches.pop(upstream).cancel()
            if upstream in self._running:
                self._running[upstream].cancel()
            if upstream in self._suspected:
                self._suspected.pop(upstream).cancel()
            self._known.discard(upstream)
            del self._probes[upstream]
            self._loads.pop(upstream, None)

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            try:
                await self.probe(upstream)
            except Exception:
                # A bug in the gateway, or no memory, must not end all probes.
                _log.exception("the probe of %s failed", upstream.url)
            pause = self._probe_interval if upstream.state == "serving" else min(_EAGER, self._probe_interval)
            count = len(self._pool)
            await asyncio.sleep(max(pause, count / _A_SECOND if count > _FEW else 0.0))

    def _broke(self, upstream: Upstream) -> None:
        """A call broke: probe its upstream at once, but not once for each of very many calls."""
        if upstream not in self._suspected and upstream.probed_at is not None:
            wait = max(0.0, upstream.probed_at + _SUSPECTED_AFTER - time.monotonic())
            self._suspected[upstream] = asyncio.get_running_loop().call_later(wait, self._ask_suspected, upstream)

    def _ask_suspected(self, upstream: Upstream) -> None:
        del self._suspected[upstream]
        self._start(upstream)

    async def probe_all(self) -> None:
        """Probe every upstream now; return when all have answered, or after a second: a hanging one is no news."""
        if probes := [asyncio.create_task(self.probe(upstream)) for upstream in self._pool]:
            await asyncio.wait(probes, timeout=_EAGER)

    async def probe(self, upstream: Upstream) -> None:
        """Probe now; concurrent callers share one probe, so that many callers cost one probe."""
        await asyncio.shield(self._start(upstream))

    def _start(self, upstream: Upstream) -> asyncio.Task[None]:
        task = self._running.get(upstream)
        if task is None:
            task = self._running[upstream] = asyncio.create_task(self._probe(upstream))
            task.add_done_callback(lambda _: self._running.pop(upstream, None))
        return task

    async def _probe(self, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                state, why = await self._ask(upstream)
        except (httpx.TimeoutException, TimeoutError):
            state, why = "down", f"no answer within {_PATIENCE:g} s"
        except httpx.ConnectError as error:
            if is_shortage(error):
                _log.warning("upstream %s cannot be asked: the gateway is short of descriptors", upstream.url)
                return
            state, why = _unconnected(upstream, str(error))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            state, why = "down", f"its answer broke off ({type(error).__name__})"
        if state != "serving":
            self._known.discard(upstream)
            # Another server may come back at this URL.
            upstream.fingerprint = upstream.prefix_hits = None
            self._loads.pop(upstream, None)
        if (state, why) != (upstream.state, upstream.why):
            level = logging.INFO if state != "down" else logging.WARNING
            _log.log(level, "upstream %s is %s%s", upstream.url, state, f": {why}" if why else "")
            if state == "serving":
                upstream.record_success()  # it is back: forget its earlier failures
        upstream.state, upstream.why, upstream.probed_at = state, why, time.monotonic()

    async def _ask(self, upstream: Upstream) -> tuple[State, str]:
        if self._credentials.value is None and upstream.authorization is None:
            return "down", f"there is no token for it: {self._credentials.why}"
        health = await self._get(upstream, "/health")
        if health.status_code != 200:
            return self._unhealthy(upstream, health.status_code)
        self._probes[upstream] += 1
        if len(self._pool) > 1 and not self._probes[upstream] % _HITS_EVERY:
            await self._read_hits(upstream)
        if upstream in self._known and self._probes[upstream] % _LIST_EVERY:
            return "serving", ""
        if why := await self._read_models(upstream):
            return "down", why
        if upstream not in self._known:
            if why := await self._learn(upstream):
                return "down", why
            self._known.add(upstream)
        return "serving", ""

    async def _read_models(self, upstream: Upstream) -> str:
        """Read the model list; return why the upstream would not take calls, empty if it would."""
        models = await self._get(upstream, "/v1/models")
        if models.status_code in (401, 403):
            return f"its /v1/models answers {models.status_code}: {self._advice(upstream)}"
        if models.status_code in REDIRECTS:
            return f"its /v1/models answers {models.status_code}, {REDIRECT_ADVICE}"
        listed, upstream.contexts = _models(models)
        if not listed:
            return f"its /v1/models answers {models.status_code} and no model list"
        self._pool.set_models(upstream, listed)
        upstream.model_list = models.content
        served = upstream.models
        if not served:
            only = ",".join(sorted(upstream.only or ()))
            return f"it serves {', '.join(listed)}, and none of models={only}, which is all that it may be asked for"
        model = self._model_among(served)
        if model is not None and model not in served and not self._route_paths:
            which = "GATEWAY_MODEL" if model == self._model else f"which GATEWAY_MODEL {self._model!r} stands for"
            return f"it does not serve {model!r} ({which}); it serves {', '.join(served)}"
        return ""

    async def _learn(self, upstream: Upstream) -> str:
        """Read the properties that are constant while it runs; return why it would refuse chats, empty if not."""
        if self._probe_audio:
            upstream.supports_audio = await self._has(upstream, "/v1/audio/transcriptions")
        if self._route_paths:
            paths = self._route_paths.items()
            upstream.routes = frozenset([name for name, path in paths if await self._has(upstream, path)])
        if not self._reads_template:
            return ""
        model = self._model_among(upstream.models)
        if model not in upstream.models:
            model = upstream.models[0]
        return await self._template_problem(upstream, model)

    def _model_among(self, served: tuple[str, ...]) -> str | None:
        """The configured model, or, if it is not served under that name, the model that it is an alias of."""
        if self._model is None or self._model in served:
            return self._model
        alias = self._model_aliases.get(self._model) or self._model_aliases.get("*")
        return self._model if alias is None else alias.first(served)

    def _unhealthy(self, upstream: Upstream, status: int) -> tuple[State, str]:
        said = f"its /health answers {status}"
        if status in (401, 403):
            return "down", f"{said}: {self._advice(upstream)}"
        if status in REDIRECTS:
            return "down", f"{said}, {REDIRECT_ADVICE}"
        # A 503 of vLLM means a dead engine. A 204, or a 503 before it ever served, means that it is not ready yet.
        loading = status == 204 or (status == 503 and not upstream.ever_served)
        return "loading" if loading else "down", said

    def _advice(self, upstream: Upstream) -> str:
        own = upstream.authorization is not None
        return "its key-file is to hold a key that it takes" if own else self._credentials.advice

    async def _has(self, upstream: Upstream, path: str) -> bool:
        """Whether a POST path exists: vLLM has only the paths that its model can answer."""
        return (await self._get(upstream, path)).status_code != 404

    async def _get(self, upstream: Upstream, path: str) -> httpx.Response:
        return await self._client.get(f"{upstream.origin}{path}", extensions={"upstream": upstream})

    async def _template_problem(self, upstream: Upstream, model: str) -> str:
        """Why the model's chat template would refuse a simplified request, empty if it would not."""
        user = {"role": "user", "content": "Hello."}
        system = [] if self._system_role == "merge" else [{"role": "system", "content": "Be brief."}]
        answer = await self._client.post(
            f"{upstream.origin}/tokenize",
            json={"model": model, "messages": [*system, user]},
            extensions={"upstream": upstream},
        )
        # Only a refusal says something about the template; a server without this path says nothing.
        if answer.status_code != 400 or not await self._has(upstream, "/v1/chat/completions"):
            return ""
        said = _error_message(answer)
        if not system:
            return f"its chat template refuses a user's message ({said})"
        return (
            f"its chat template refuses a system message ({said}): set GATEWAY_SYSTEM_ROLE=merge, "
            "or give vLLM a --chat-template that takes one"
        )

    async def _read_hits(self, upstream: Upstream) -> None:
        """Read the prefix cache hit rate since the last read, by tokens; a failed read changes nothing."""
        try:
            async with asyncio.timeout(_HITS_PATIENCE):
                answer = await self._get(upstream, "/metrics")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            return
        if (load := vllm_metrics.read(answer.text)) is not None:
            before, self._loads[upstream] = self._loads.get(upstream), load
            looked_for = load.looked_for - (before.looked_for if before else 0)
            if looked_for > 0:
                upstream.prefix_hits = round((load.found - (before.found if before else 0)) / looked_for, 4)

    async def metrics(self, upstream: Upstream) -> str:
        """The text of its `/metrics`, empty if it has none; an upstream that does not answer is probed at once."""
        if self._credentials.value is None and upstream.authorization is None:
            return ""
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._get(upstream, "/metrics")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            await self.probe(upstream)
            return ""
        return answer.text if answer.status_code == 200 else ""

    def report(self, now: float) -> list[dict[str, Any]]:
        """The state of each upstream, including removed ones with running calls; then the names without addresses."""
        known = [
            {
                "url": upstream.url,
                "source": upstream.source,
                "state": status[0],
                "why": status[1],
                "models": upstream.models,
                "in_flight": upstream.in_flight,
                "prefix_hits": upstream.prefix_hits,
                "age": None if upstream.probed_at is None else round(now - upstream.probed_at, 1),
            }
            for upstream in (*self._pool, *self._pool.leaving)
            if upstream.in_flight or not upstream.gone
            for status in [upstream.status(now)]
        ]
        none = {"state": "down", "models": (), "in_flight": 0, "prefix_hits": None, "age": None}
        return known + [{"url": url, "source": url, "why": why, **none} for url, why in self._pool.astray.items()]


def _unconnected(upstream: Upstream, why: str) -> tuple[State, str]:
    if why != REFUSED:
        return "down", f"it cannot be reached ({why})"
    if not upstream.ever_served:
        return "loading", "it refuses connections: it has not started yet"
    return "down", "it refuses connections"


def _models(answer: httpx.Response) -> tuple[tuple[str, ...], dict[str, int]]:
    """The models' ids, and the context lengths of those that state one."""
    try:
        models = orjson.loads(answer.content)["data"] if answer.status_code == 200 else []
        # Interned, so that a probe does not allocate new copies of ids that other objects hold.
        lengths = {sys.intern(model["id"]): model.get("max_model_len") for model in models}
        return tuple(lengths), {model: length for model, length in lengths.items() if isinstance(length, int)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return (), {}


def _error_message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:200].encode(errors="replace").decode()
    except (ValueError, LookupError, TypeError):
        return f"status {answer.status_code}"

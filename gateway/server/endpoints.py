"""The gateway's own endpoints, one short handler each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gateway.page.document import Document
from gateway.page.sampler import MOST_WATCHERS, Sampler
from gateway.pool.model_list import union
from gateway.relay.keyed_record import KEY_NEEDED
from gateway.server.context import Parts, context_of, state_of
from gateway.server.openapi import MODEL
from gateway.server.responses import to_response
from gateway.wire.errors import ModelNotFound, NoneReady, TooMany, Unauthorized
from gateway.wire.heads import RequestHead

Handler = Callable[[Request], Awaitable[Response]]
# A status, a JSON body and headers.
Answer = tuple[int, bytes, dict[str, str]]

_LIVES = b'{"status":"ok"}'

# Shutdown grace of a status stream in seconds; a stream itself ends within a sample and a half.
_WATCH_ENDS = 5.0


def _parts(request: Request) -> Parts:
    return state_of(request.scope)["parts"]


def _sampler(request: Request) -> Sampler:
    sampler = _parts(request).sampler
    assert sampler is not None  # these handlers are registered only with the page
    return sampler


def _has_key(request: Request) -> bool:
    """Whether the request has a valid key, or no keys are configured."""
    return _is_known(_parts(request), context_of(request.scope).head)


def _is_known(parts: Parts, head: RequestHead) -> bool:
    keys = parts.data_path.keys
    return keys is None or (head.key is not None and keys.find(head.key) is not None)


def guarded(handler: Handler) -> Handler:
    """Wrap a handler so that it needs a key if keys are configured; the exchange itself checks relayed calls."""

    async def asks_for_key(request: Request) -> Response:
        if _has_key(request):
            return await handler(request)
        return to_response(Unauthorized(KEY_NEEDED), context_of(request.scope).request_id)

    return asks_for_key


def lives(parts: Parts, head: RequestHead) -> Answer:
    """Liveness: 200 while this process runs, whatever the state of the upstreams."""
    return 200, _LIVES, {}


def how_all_is(parts: Parts, head: RequestHead, asked: str | None = None) -> Answer:
    """200 only when a chat call would succeed now, else 503; with the state of each upstream.

    The call is one for the model `asked`, or for the model of a simplified call that names none. Only clients that may
    call see the upstreams' URLs and sources.
    """
    upstreams = parts.prober.report(time.monotonic())
    model = parts.data_path.reader.resolve("chat", asked) or parts.data_path.reader.default_model
    allows_host = parts.data_path.allows_host
    if not _is_known(parts, head) or (allows_host is not None and not allows_host(head.hosts or b"")):
        for upstream in upstreams:
            del upstream["url"], upstream["source"]
    draining = parts.data_path.drain.began
    answered_by = [one for one in upstreams if model is None or model in one["models"]]
    serving = not draining and any(upstream["state"] == "serving" for upstream in answered_by)
    body: dict[str, Any] = {
        "Service Title": "vllm-gateway",
        "Service Description": "A thin gateway in front of vLLM model servers",
        "status": "draining" if draining else "serving" if serving else "unavailable",
        "model": model,
        "upstreams": upstreams,
    }
    return (200, orjson.dumps(body), {}) if serving else (503, orjson.dumps(body), {"retry-after": "2"})


# Endpoints that are polled often and open to anyone: answering them in the protocol costs the server least.
AT_ONCE: dict[bytes, Callable[[Parts, RequestHead], Answer]] = {b"/health": lives, b"/v1/health_check": how_all_is}


async def health(request: Request) -> Response:
    """Return the answer of `lives`."""
    return _response(lives(_parts(request), context_of(request.scope).head))


async def health_check(request: Request) -> Response:
    """Return the answer of `how_all_is` for the model in `?model=`."""
    head = context_of(request.scope).head
    return _response(how_all_is(_parts(request), head, request.query_params.get("model")))


def _response(answer: Answer) -> Response:
    status, content, headers = answer
    return Response(content, status, headers, media_type="application/json")


async def ping(request: Request) -> Response:
    """Answer load balancers of GPU workers: 200 serving, 204 loading, else 503; it sends no probe."""
    parts = _parts(request)
    upstreams, model = parts.prober.report(time.monotonic()), parts.data_path.reader.default_model
    states = {one["state"] for one in upstreams if model is None or not one["models"] or model in one["models"]}
    if parts.data_path.drain.began or not states & {"serving", "loading"}:
        return JSONResponse({"status": "unhealthy"}, 503)
    return JSONResponse({"status": "healthy"}) if "serving" in states else Response(status_code=204)


def _models(request: Request) -> dict[str, dict[str, Any]]:
    """The models of all upstreams that are not down, by id and with aliases, from the probes; raises NoneReady."""
    path, now = _parts(request).data_path, time.monotonic()
    lists = [(one.model_list, one.models) for one in path.pool if one.model_list and one.status(now)[0] != "down"]
    if not lists:
        raise NoneReady("No model server is up: try again soon.")
    return union(lists, path.reader.model_aliases)


async def models(request: Request) -> Response:
    """OpenAI's list of models, merged from all upstreams."""
    try:
        found = _models(request)
    except NoneReady as error:
        return to_response(error, context_of(request.scope).request_id)
    return Response(orjson.dumps({"object": "list", "data": [*found.values()]}), media_type="application/json")


async def model(request: Request) -> Response:
    """One model of that list, by its id."""
    context, name = context_of(request.scope), request.path_params["model"]
    context.route = MODEL
    if not name:
        raise HTTPException(404)
    try:
        found = _models(request)
        if name not in found:
            others = ", ".join(found)
            raise ModelNotFound(f"The model {name[:200]!r} does not exist; those that do: {others}.", param="model")
    except (NoneReady, ModelNotFound) as error:
        return to_response(error, context.request_id)
    return Response(orjson.dumps(found[name]), media_type="application/json")


async def statistics(request: Request) -> Response:
    """The durations of the last chat calls, in seconds."""
    _parts(request).flush()
    return JSONResponse(_parts(request).recent.report())


async def metrics(request: Request) -> Response:
    """The metrics in Prometheus's exposition format."""
    _parts(request).flush()
    return Response(await _parts(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def page(document: Document) -> Handler:
    """A handler that serves the page."""

    async def answers(request: Request) -> Response:
        return Response(document.content, headers=document.headers, media_type="text/html")

    return answers


async def status(request: Request) -> Response:
    """The status of the gateway and its upstreams, now and over the last five minutes."""
    content = await _sampler(request).report()
    return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")


async def status_stream(request: Request) -> Response:
    """The same status as server-sent events, one per second."""
    # Imported only here: it patches uvicorn's exit handler, which our server does not use, and not every gateway is
    # watched.
    from sse_starlette import EventSourceResponse

    sampler = _sampler(request)

    class Watch(EventSourceResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                sampler.end_watch()

    async def events() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(sampler.watch()) as watched:
            async for event in watched:
                if not _has_key(request):  # the key has been revoked
                    return
                yield event

    if not sampler.begin_watch():
        refused = TooMany(f"{MOST_WATCHERS} watch already, which is the most: try again later, or ask /v1/status.")
        return to_response(refused, context_of(request.scope).request_id)
    # Without the grace period sse-starlette cuts streams at shutdown; a watch ends by itself well within it.
    return Watch(events(), ping=0, shutdown_grace_period=_WATCH_ENDS)

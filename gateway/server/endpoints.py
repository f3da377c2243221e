"""The gateway's own endpoints: one short handler each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.page.document import Document
from gateway.page.sampler import Sampler
from gateway.relay.exchange import KEY_NEEDED
from gateway.server.context import Parts, context_of, state_of
from gateway.server.responses import to_response
from gateway.wire.errors import Unauthorized

Handler = Callable[[Request], Awaitable[Response]]


# No longer than a sample and a half does a watch go on, in seconds.
_WATCH_ENDS = 5.0


def _parts(request: Request) -> Parts:
    return state_of(request.scope)["parts"]


def _sampler(request: Request) -> Sampler:
    sampler = _parts(request).sampler
    assert sampler is not None  # these handlers are there where the page is
    return sampler


def _has_key(request: Request) -> bool:
    """Whether there are no keys, or one was brought."""
    keys, digest = _parts(request).data_path.keys, context_of(request.scope).head.key
    return keys is None or (digest is not None and keys.find(digest) is not None)


def guarded(handler: Handler) -> Handler:
    """A handler of what only those with a key may see, where there are keys; calls are guarded by their exchange."""

    async def asks_for_key(request: Request) -> Response:
        if _has_key(request):
            return await handler(request)
        return to_response(Unauthorized(KEY_NEEDED), context_of(request.scope).request_id)

    return asks_for_key


async def health(request: Request) -> Response:
    """This process lives; says nothing of the upstreams."""
    return JSONResponse({"status": "ok"})


async def health_check(request: Request) -> Response:
    """200 only when a chat call would succeed now, else 503; with how each upstream is and, given a key, where."""
    prober = _parts(request).prober
    await prober.probe_all()
    upstreams = prober.report(time.monotonic())
    if not _has_key(request):
        for upstream in upstreams:
            del upstream["url"]
    draining = _parts(request).data_path.drain.began
    serving = not draining and any(upstream["state"] == "serving" for upstream in upstreams)
    body: dict[str, Any] = {
        "Service Title": "vllm-gateway",
        "Service Description": "A thin gateway in front of vLLM model servers",
        "status": "draining" if draining else "serving" if serving else "unavailable",
        "upstreams": upstreams,
    }
    return JSONResponse(body, 200 if serving else 503, None if serving else {"retry-after": "2"})


async def ping(request: Request) -> Response:
    """What load balancers of GPU workers ask for: 200 serving, 204 loading, else 503; nothing is probed for it."""
    states = {upstream["state"] for upstream in _parts(request).prober.report(time.monotonic())}
    if _parts(request).data_path.drain.began or not states & {"serving", "loading"}:
        return JSONResponse({"status": "unhealthy"}, 503)
    return JSONResponse({"status": "healthy"}) if "serving" in states else Response(status_code=204)


async def statistics(request: Request) -> Response:
    """How long the last chat calls took, in seconds."""
    _parts(request).flush()
    return JSONResponse(_parts(request).recent.report())


async def metrics(request: Request) -> Response:
    """Prometheus's exposition format."""
    _parts(request).flush()
    return Response(_parts(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def page(document: Document) -> Handler:
    """What answers with the page."""

    async def answers(request: Request) -> Response:
        return Response(document.content, headers=document.headers, media_type="text/html")

    return answers


async def status(request: Request) -> Response:
    """How the gateway and its upstreams are, and were in the last five minutes."""
    content = await _sampler(request).report()
    return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")


async def status_stream(request: Request) -> Response:
    """The same as server-sent events, one a second."""
    # Only here: it patches uvicorn's way to end, which ours does not go, and not every gateway is watched.
    from sse_starlette import EventSourceResponse

    async def events() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(_sampler(request).watch()) as watched:
            async for event in watched:
                if not _has_key(request):  # its key has been taken back
                    return
                yield event

    # It would cut what still runs when the gateway ends; a watch ends by itself, well within this time.
    return EventSourceResponse(events(), ping=0, shutdown_grace_period=_WATCH_ENDS)

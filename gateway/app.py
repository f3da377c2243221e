"""Composition root: `create_app` puts the parts together as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TypedDict

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from gateway import endpoints
from gateway.config import Settings
from gateway.exchange import ROUTES, DataPath, Exchange, Limits
from gateway.health import Prober
from gateway.logs import LineWriter, RequestLog
from gateway.metrics import Metrics
from gateway.transport import ConnectionPool
from gateway.upstreams import Upstream, UpstreamPool


class State(TypedDict):
    """What the handlers find in `request.state`."""

    data_path: DataPath
    prober: Prober
    metrics: Metrics
    request_log: RequestLog


class _Watch:
    """The exchanges' observer: metrics and the log line."""

    def __init__(self, metrics: Metrics, request_log: RequestLog) -> None:
        self.started = metrics.started
        self._count = metrics.finished
        self._log = request_log.exchange

    def finished(self, exchange: Exchange) -> None:
        self._count(exchange)
        self._log(exchange)


class _Clock:
    """Real time. Not the loop's own `time`, which uvloop reads once a turn and in whole milliseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.time = time.monotonic
        self.call_later = loop.call_later


def create_app(settings: Settings, log: LineWriter | None = None) -> Starlette:
    """The whole gateway under any ASGI server that runs the lifespan; `log` takes a line a request."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        pool = UpstreamPool(tuple(map(Upstream.from_url, settings.upstreams)))
        prober = create_prober(settings, pool)
        connections = ConnectionPool(settings.connect_timeout)
        metrics = Metrics(pool)
        request_log = RequestLog(log if settings.log_level in ("DEBUG", "INFO") else None, settings.log_format)
        data_path = DataPath(
            pool=pool,
            transport=connections,
            clock=_Clock(asyncio.get_running_loop()),
            observer=_Watch(metrics, request_log),
            limits=Limits(
                max_body=settings.max_body_bytes,
                first_token=settings.first_token_timeout,
                idle=settings.idle_timeout,
                total=settings.total_timeout,
                body=settings.body_timeout,
            ),
            model=settings.model,
            style=settings.stream_style,
            system_role=settings.system_role,
            whole=settings.disable_streaming,
            authorization=_authorization(settings),
        )
        async with prober.probing():
            yield {"data_path": data_path, "prober": prober, "metrics": metrics, "request_log": request_log}
        await connections.close()

    app = Starlette(
        routes=[
            *(Route(route.path, endpoints.Relay(route), methods=[route.method]) for route in ROUTES),
            Route("/health", endpoints.health, methods=["GET"]),
            Route("/v1/health_check", endpoints.health_check, methods=["GET"]),
            Route("/metrics", endpoints.metrics, methods=["GET"]),
        ],
        middleware=[Middleware(endpoints.Outermost)],
        exception_handlers={HTTPException: endpoints.refused},
        lifespan=lifespan,
    )
    # A redirect would be built from the Host header, which the client chooses.
    app.router.redirect_slashes = False
    return app


def create_prober(settings: Settings, pool: UpstreamPool) -> Prober:
    """What probes the upstreams as these settings say."""
    return Prober(
        pool,
        interval=settings.probe_interval,
        model=settings.model,
        system_role=settings.system_role,
        authorization=_authorization(settings),
    )


def _authorization(settings: Settings) -> bytes | None:
    key = settings.upstream_api_key
    return b"Bearer " + key.get_secret_value().encode() if key else None

"""Composition root: `create_app` builds the Starlette application from its parts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.admission.keys import Keys
from gateway.admission.owners import Owners
from gateway.admission.work_in_steps import WorkInSteps
from gateway.config.load import asks_for_traces
from gateway.config.memory_limit import default_max_buffered_bytes
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings
from gateway.config.urls import is_loopback
from gateway.dialects.body_limits import BodyLimits
from gateway.dialects.reader import BodyReader, Models
from gateway.finished_requests import FinishedRequests
from gateway.housekeeping import run_periodic_work
from gateway.observability.logs import LineWriter
from gateway.observability.metrics import Metrics
from gateway.observability.own_version import own_build, own_version
from gateway.observability.recent_requests import PageFigures, RecentRequests
from gateway.observability.request_log import RequestLog
from gateway.page.document import Document
from gateway.page.sampler import Sampler
from gateway.pool.aliases import Alias
from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.relay.data_path import CallLimits, DataPath, Drain
from gateway.relay.interfaces import Call
from gateway.relay.keyed_record import LIMIT_HEADERS, ROUTE_HEADERS, TOKEN_HEADERS
from gateway.reloading import Reloading
from gateway.server import endpoints
from gateway.server.asgi import Relay
from gateway.server.context import Parts, State
from gateway.server.middleware import Cors, PortRoute, RequestContext
from gateway.server.openapi import describe
from gateway.server.responses import refused
from gateway.upstream.connections import ConnectionLimits, ConnectionPool
from gateway.upstream.credentials import ClientCredentials, FixedKey
from gateway.upstream.discovery import BY_NAME, Discovery
from gateway.upstream.httpx_transport import UpstreamTransport
from gateway.upstream.prober import Prober
from gateway.upstream.resolver import Resolver, SystemLookup, system_lookup
from gateway.wire.heads import HeadLimits
from gateway.wire.near_paths import NearPaths
from gateway.wire.origins import host_check
from gateway.wire.routes import ROUTES

if TYPE_CHECKING:
    from gateway.observability.tracing import Tracer

_log = logging.getLogger(__name__)


def create_app(settings: Settings, secrets: Secrets, log: LineWriter | None = None) -> Starlette:
    """The whole gateway, for any ASGI server that runs the lifespan; `log` gets one line per request."""
    relayed = [route for route in ROUTES if route.name in settings.routes]
    description = describe(relayed, page=settings.page)
    paths = frozenset(description["paths"])
    # The check stops DNS rebinding by a page. Client keys also stop it, and so does the proxy in front of a port that
    # is not on loopback.
    checks_hosts = bool(settings.allowed_hosts) or (secrets.client_keys is None and is_loopback(settings.host))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        pool = UpstreamPool(
            (),
            max_in_flight=settings.max_in_flight,
            max_in_flight_per_upstream=settings.max_in_flight_per_upstream or settings.max_in_flight,
            by_prefix=settings.routing == "prefix",
        )
        connections = create_connections(settings, secrets)
        transport = UpstreamTransport(connections)
        credentials = create_credentials(settings, secrets, transport)
        aliases: dict[str, Alias] = {}
        prober = create_prober(settings, pool, credentials, transport, aliases)
        discovery = create_discovery(settings, secrets, pool, prober, connections)
        in_flight: set[Call] = set()
        queue: AdmissionQueue[Call] = AdmissionQueue(settings.max_queue)
        buffers = Buffers(settings.max_buffered_bytes or default_max_buffered_bytes())
        arrivals: Arrivals[Call] = Arrivals(settings.max_in_flight + settings.max_queue, buffers, time.monotonic)
        request_log = RequestLog(log if settings.log_level in ("DEBUG", "INFO") else None, settings.log_format)
        tracer = create_tracer(settings)
        page_figures = PageFigures() if settings.page else None
        recent = RecentRequests(page_figures)
        keys = None if secrets.client_keys is None else Keys(secrets.client_keys)
        reloading = Reloading(
            settings,
            secrets,
            keys=keys,
            discovery=discovery,
            aliases=aliases,
            credentials=credentials,
            connections=connections,
        )
        metrics = Metrics(
            pool,
            in_flight,
            queue,
            arrivals,
            buffers,
            time.monotonic,
            lambda: 0 if log is None else log.lost,
            aliases,
            lambda: () if keys is None else keys.names,
            lambda: reloading.certificate_ends_at,
        )
        finished = FinishedRequests(metrics.requests, recent, request_log, tracer)
        data_path = DataPath(
            routes={
                (one.method.encode(), one.path.encode()): one
                for one in relayed
                if "{" not in one.path and one.body != "upload"
            },
            pool=pool,
            reader=create_reader(settings, pool, aliases, keyed=keys is not None),
            transport=connections,
            # Not the loop's clock, which uvloop reads once per turn and in whole milliseconds.
            time=time.monotonic,
            call_later=asyncio.get_running_loop().call_later,
            in_flight=in_flight,
            queue=queue,
            buffers=buffers,
            arrivals=arrivals,
            work=WorkInSteps(asyncio.get_running_loop().call_later, time.monotonic),
            drain=Drain(),
            finished=finished.add,
            salts_caches=settings.cache_salt == "key",
            owners=Owners(settings.key_max_in_flight),
            proxies=settings.trusted_proxies,
            limits=CallLimits(
                max_connections=settings.max_connections or math.inf,
                max_body_bytes=settings.max_body_bytes,
                queue_timeout=settings.queue_timeout,
                first_token_timeout=settings.first_token_timeout,
                idle_timeout=settings.idle_timeout,
                total_timeout=settings.total_timeout,
                header_timeout=settings.header_timeout,
                body_timeout=settings.body_timeout,
                client_write_timeout=settings.client_write_timeout,
                heartbeat_interval=settings.heartbeat_interval,
            ),
            head_limits=HeadLimits(settings.max_head_bytes, settings.max_headers, settings.max_url_bytes),
            keys=keys,
            credentials=credentials,
            forwarded_headers=frozenset(name.encode() for name in settings.forwarded_headers),
            cors_origins=frozenset(map(str.encode, settings.cors_origins)),
            allows_host=host_check(settings.allowed_hosts) if checks_hosts else None,
            traced=None if tracer is None else tracer.to_upstream,
            tells_route=settings.route_headers,
        )
        sampler = None if page_figures is None else Sampler(data_path, prober, page_figures, own_version(), own_build())
        # The periodic work also takes the samples: another sleeping task would allocate small objects among request
        # objects and keep their memory allocated.
        looking = asyncio.create_task(run_periodic_work(data_path, finished, sampler))
        async with credentials.renewing(), discovery.discovering(), prober.probing(), reloading.watching():
            yield {
                "parts": Parts(
                    data_path=data_path,
                    prober=prober,
                    metrics=metrics,
                    recent=recent,
                    metrics_port=settings.metrics_port,
                    health_port=settings.health_port,
                    request_log=request_log,
                    flush=finished.flush,
                    sampler=sampler,
                    near_paths=near_paths,
                    reread=reloading.reread,
                )
            }
        looking.cancel()
        if sampler is not None:
            await sampler.close()
        await connections.close()
        finished.flush()
        if tracer is not None:
            tracer.close()

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    # Open without a key: the endpoints that platforms poll, and a page that holds no private data.
    open_to_all: dict[str, endpoints.Handler] = {
        "/health": endpoints.health,
        "/v1/health_check": endpoints.health_check,
        "/ping": endpoints.ping,
    }
    own = {"/v1/statistics": endpoints.statistics, "/metrics": endpoints.metrics, "/openapi.json": openapi}
    elsewhere: list[BaseRoute] = []
    if settings.page:
        open_to_all["/"] = endpoints.page(Document())
        own |= {"/v1/status": endpoints.status, "/v1/status/stream": endpoints.status_stream}
    if any(one.name == "models" for one in relayed):
        own["/v1/models/{model:path}"] = endpoints.model
        # The list of a single server is relayed as it is; several lists, or one with aliases, are merged.
        if settings.may_have_several or settings.model_aliases.keys() - {"*"}:
            own["/v1/models"] = endpoints.models
            relayed = [one for one in relayed if one.name != "models"]
    if settings.metrics_port is not None:
        del own["/metrics"], description["paths"]["/metrics"]
        elsewhere = [PortRoute(settings.metrics_port, [Route("/metrics", endpoints.metrics, methods=["GET"])])]
    near_paths = NearPaths(description["paths"])
    app = Starlette(
        routes=[
            *elsewhere,
            *(Route(one.path, Relay(one), methods=[one.method]) for one in relayed),
            # The releases redirected a path with a slash to the path without; some clients do not follow redirects.
            *(
                Route(f"{one.path}/", Relay(one), methods=["POST"])
                for one in relayed
                if settings.compat and one.body == "chat"
            ),
            *(Route(path, handler, methods=["GET"]) for path, handler in open_to_all.items()),
            *(Route(path, endpoints.guarded(handler), methods=["GET"]) for path, handler in own.items()),
        ],
        middleware=[*_cors(settings), Middleware(RequestContext, paths=paths)],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )
    # A redirect would be built from the Host header, which the client chooses.
    app.router.redirect_slashes = False
    return app


def create_reader(settings: Settings, models: Models, aliases: Mapping[str, Alias], *, keyed: bool) -> BodyReader:
    """Create the reader of request bodies for these settings and models; `keyed` says whether keys are required."""
    return BodyReader(
        models=models,
        body_limits=BodyLimits(
            max_n=settings.max_n,
            max_new_tokens=settings.max_new_tokens,
            max_messages=settings.max_messages,
            max_inputs=settings.max_inputs,
            max_json_depth=settings.max_json_depth,
            max_json_values=settings.max_json_values,
            max_json_bytes=settings.max_json_bytes,
            refused_fields=settings.refused_fields,
        ),
        media_domains=frozenset(settings.media_domains),
        model=settings.model,
        stream_style=settings.stream_style,
        system_role=settings.system_role,
        disable_streaming=settings.disable_streaming or settings.output_guard,
        connector=settings.connector,
        compat=settings.compat,
        forward_sampling=settings.forward_sampling,
        model_aliases=aliases,
        counts_tokens=settings.count_tokens != "off",
        counts_all=settings.count_tokens == "on" or (settings.count_tokens == "auto" and keyed),
    )


def create_tracer(settings: Settings) -> Tracer | None:
    """Create the tracer; None if OpenTelemetry's variables do not enable tracing, or its packages are missing."""
    if not asks_for_traces():
        return None
    try:
        # Imported here: it takes megabytes, needed only for tracing.
        from gateway.observability.tracing import Tracer
    except ImportError as error:
        _log.warning("requests are not traced, as OTEL_… asks: pip install 'vllm-gateway[otel]' (%s)", error)
        return None
    return Tracer(tls=settings.tls_cert_file is not None)


def create_credentials(
    settings: Settings, secrets: Secrets, transport: httpx.AsyncBaseTransport
) -> FixedKey | ClientCredentials:
    """Create the upstreams' credentials; `transport` carries the requests for tokens."""
    if secrets.token_client is not None:
        return ClientCredentials(secrets.token_client, transport)
    key = settings.upstream_api_key
    return FixedKey(key.get_secret_value() if key else None)


def create_connections(settings: Settings, secrets: Secrets) -> ConnectionPool:
    """Create the connections for calls, probes and requests for tokens."""
    limits = ConnectionLimits(
        connect_timeout=settings.connect_timeout,
        max_age=settings.upstream_max_age,
        max_requests=settings.upstream_max_requests,
        keepalive=settings.tcp_keepalive,
    )
    tokens = [secrets.token_client.url] if secrets.token_client else []
    named = [one.url for one in secrets.upstreams.sources if not one.url.startswith(BY_NAME)]
    hosts = [Upstream.from_url(url).host for url in (*named, *tokens)]
    # A file may later contain a host name.
    lookup = SystemLookup() if secrets.upstreams.files else system_lookup(hosts)
    return ConnectionPool(limits, Resolver(lookup), secrets.upstream_tls)


def create_discovery(
    settings: Settings, secrets: Secrets, pool: UpstreamPool, prober: Prober, connections: ConnectionPool
) -> Discovery:
    """Create the discovery, which keeps the pool in step with the configured upstreams as they come and go."""

    def changed(came: list[Upstream], gone: list[Upstream], doubted: list[Upstream]) -> None:
        prober.follow(came, gone)
        for upstream in (*gone, *doubted):
            connections.leave(upstream)
        connections.forget_hosts({one.at for one in gone} - {one.at for one in pool})

    # A lambda, because tests replace SystemLookup.
    return Discovery(secrets.upstreams.sources, pool, lambda: SystemLookup(), settings.probe_interval, changed)


def create_prober(
    settings: Settings,
    pool: UpstreamPool,
    credentials: FixedKey | ClientCredentials,
    transport: httpx.AsyncBaseTransport,
    aliases: Mapping[str, Alias],
) -> Prober:
    """Create the prober of the upstreams for these settings."""
    several = settings.may_have_several
    return Prober(
        pool,
        probe_interval=settings.probe_interval,
        model=settings.model,
        model_aliases=aliases,
        system_role=settings.system_role,
        reads_template="chat" in settings.routes and settings.connector == "generic",
        transport=transport,
        probe_audio="audio" in settings.routes and several,
        route_paths={route.name: route.path for route in reversed(ROUTES) if route.asks_the_model} if several else {},
        credentials=credentials,
    )


def _cors(settings: Settings) -> list[Middleware]:
    """The CORS middleware, outermost because a page must also be allowed to read errors."""
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            Cors,
            metrics_port=settings.metrics_port,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            # Access from a public into a private network: not allowed for every origin.
            allow_private_network="*" not in settings.cors_origins,
            expose_headers=[
                "x-request-id",
                "x-should-retry",
                "retry-after",
                *map(bytes.decode, (*LIMIT_HEADERS, *TOKEN_HEADERS, *ROUTE_HEADERS)),
            ],
        )
    ]

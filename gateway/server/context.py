"""What the server and the application's handlers find: the gateway's parts, and what is known of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

from starlette.responses import Response
from starlette.types import Scope

from gateway.observability.metrics import Metrics
from gateway.observability.recent_requests import RecentRequests
from gateway.observability.request_log import RequestLog
from gateway.page.sampler import Sampler
from gateway.relay.data_path import DataPath
from gateway.upstream.prober import Prober
from gateway.wire.heads import RequestHead, new_request_id
from gateway.wire.near_paths import NearPaths


@dataclass(frozen=True, slots=True)
class Parts:
    """One gateway's parts. `flush` has the finished requests counted, traced and logged; `sampler` is the page's.

    `near_paths` tells which of the paths that are served was meant. `reread` has the files that the settings name read
    anew.
    """

    data_path: DataPath
    prober: Prober
    metrics: Metrics
    recent: RecentRequests
    metrics_port: int | None
    health_port: int | None
    request_log: RequestLog
    flush: Callable[[], None]
    sampler: Sampler | None
    near_paths: NearPaths
    reread: Callable[[], None]


class State(TypedDict):
    """The lifespan's state, of which ASGI gives each request a copy; `leaving` is called once the client has left."""

    parts: Parts
    leaving: NotRequired[list[Callable[[], None]]]


@dataclass(slots=True)
class Context:
    """One request of the application: its head and id, whether an exchange answers it, and what answers a preflight.

    `route` is what metrics call its path, where that is not the same for every request.
    """

    head: RequestHead
    request_id: str
    relayed: bool = False
    route: str | None = None
    preflight: Response | None = None


def state_of(scope: Mapping[str, object]) -> State:
    """The gateway's state, as this request has it."""
    return cast(State, scope["state"])


def context_of(scope: Scope) -> Context:
    """The request's context, which the first that asks makes."""
    context: Context | None = scope.get("gateway")
    if context is None:
        # A copy, as the server may yet add trailers to its own list.
        head = RequestHead(list(scope["headers"]), state_of(scope)["parts"].data_path.forwarded_headers)
        head.request_id = request_id = head.request_id or new_request_id()
        context = scope["gateway"] = Context(head, request_id)
    return context

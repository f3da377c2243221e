"""What the server and the handlers share: the gateway's parts and the context of a request."""

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
    """The parts of one gateway.

    `flush` counts, traces and logs the finished requests. `sampler` feeds the status page. `near_paths` suggests a
    served path for a mistyped one. `reread` reads the files that the settings name again.
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
    """The lifespan's state, copied by ASGI for each request; `leaving` is called when the client disconnects."""

    parts: Parts
    leaving: NotRequired[list[Callable[[], None]]]


@dataclass(slots=True)
class Context:
    """One request of the application: its head and id, `relayed` if an exchange answers it, and a preflight's response.

    `route` is the metrics' name for the path, set where the path varies between requests.
    """

    head: RequestHead
    request_id: str
    relayed: bool = False
    route: str | None = None
    preflight: Response | None = None


def state_of(scope: Mapping[str, object]) -> State:
    """The gateway's state in this request's scope."""
    return cast(State, scope["state"])


def context_of(scope: Scope) -> Context:
    """The request's context, created on first use."""
    context: Context | None = scope.get("gateway")
    if context is None:
        # A copy, because the server may later append trailers to its own list.
        head = RequestHead(list(scope["headers"]), state_of(scope)["parts"].data_path.forwarded_headers)
        head.request_id = request_id = head.request_id or new_request_id()
        context = scope["gateway"] = Context(head, request_id)
    return context

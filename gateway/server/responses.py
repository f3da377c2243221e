"""The gateway's errors as responses of the application."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from gateway.server.context import context_of, state_of
from gateway.wire.errors import GatewayError, MethodNotAllowed, NotFound
from gateway.wire.sse import Ends


def no_path(scope: Scope) -> NotFound:
    """The error for a path that is not served; it suggests the nearest served path."""
    asked = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")  # as the client sent it, encoded or not
    nearest = state_of(scope)["parts"].near_paths.nearest(scope["path"])
    meant = f": did you mean {nearest}?" if nearest and nearest != asked else "."
    return NotFound(f"There is no path {asked[:200]!r} here{meant}")


def to_response(
    error: GatewayError, request_id: str, headers: dict[str, str] | None = None, ends: Ends = "done"
) -> Response:
    """Convert an error to a response, in OpenAI's envelope or Anthropic's."""
    own = {name.decode(): value.decode() for name, value in error.answer_headers}
    content = error.envelope(request_id, ends)
    return Response(content, error.status, own | (headers or {}), media_type="application/json")


async def refused(request: Request, exception: Exception) -> Response:
    """Handle Starlette's own refusals: unknown path, or method not allowed on it."""
    assert isinstance(exception, HTTPException)
    error: GatewayError
    path = request.scope["path"][:200]
    if exception.status_code == 405:
        allowed = (exception.headers or {}).get("Allow", "")
        error = MethodNotAllowed(f"{request.method[:20]} is not allowed on {path!r}; allowed: {allowed}.")
    else:
        error = no_path(request.scope)
    headers = dict(exception.headers) if exception.headers else None
    ends: Ends = "messages" if "/messages" in path else "done"
    return to_response(error, context_of(request.scope).request_id, headers, ends)

"""The error tree, OpenAI's error envelope, and how an error ends a stream that has begun."""

from __future__ import annotations

import errno
from collections.abc import Collection
from typing import Literal

import orjson

from gateway.wire.sse import Ends

# Codes of the errors after which a retry may well succeed: the call has not begun, or another server may take it.
# OpenAI's and Anthropic's clients retry twice after each 408, 409, 429 and 5xx, unless `x-should-retry` says otherwise.
# Not listed: timeouts while the model works, as a retry would process the same prompt and time out again, and faults of
# the request or of this gateway, which a retry would meet again.
RETRIED = frozenset(
    {
        "body_timeout",
        "connect_timeout",
        "draining",
        "gateway_shortage",
        "head_timeout",
        "no_upstream_ready",
        "rate_limit_exceeded",
        "too_many_requests",
        "upstream_broken",
        "upstream_unreachable",
    }
)
_SHOULD_RETRY = {True: (b"x-should-retry", b"true"), False: (b"x-should-retry", b"false")}


class GatewayError(Exception):
    """An error response of the gateway's own; its text is the message that the client reads.

    `status` is the HTTP status, `type` and `code` stand in the envelope and `outcome` in the log. `param`
    names the field of the request that is wrong. `headers` are the headers of this kind of error.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    outcome = "done"
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def answer_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The headers that are sent with the error."""
        return (*self.headers, _SHOULD_RETRY[self.code in RETRIED])

    def envelope(self, request_id: str, ends: Ends = "done") -> bytes:
        """OpenAI's error object. It holds the request id, because clients' error classes show this object.

        Anthropic's error object, for its own routes, has one more field and other values of the type.
        """
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "request_id": request_id,
        }
        if ends == "messages":
            error["type"] = _ANTHROPIC_TYPES.get(self.status, self.type)
            return orjson.dumps({"type": "error", "error": error, "request_id": request_id})
        return orjson.dumps({"error": error})

    def event(self, request_id: str, ends: Ends = "done", number: int = 0) -> bytes:
        """The error as a server-sent event and the end of the stream, both as vLLM writes them.

        `number` is the event's sequence number, in streams that number their events.
        """
        if ends == "messages":
            return b"event: error\ndata: " + self.envelope(request_id, ends) + b"\n\n"
        if ends == "responses":
            error = {
                "type": "error",
                "code": self.code,
                "message": self.message,
                "param": self.param,
                "sequence_number": number,
                "request_id": request_id,
            }
            return b"event: error\ndata: " + orjson.dumps(error) + b"\n\n"
        return b"data: " + self.envelope(request_id) + b"\n\ndata: [DONE]\n\n"


def body_too_large(most: int) -> TooLarge:
    """The error for a body of more than `most` bytes."""
    return TooLarge(f"The request's body must be at most {most} bytes (GATEWAY_MAX_BODY_BYTES).")


def naming_served(content: bytes, model: str, served: Collection[str]) -> bytes:
    """An upstream's refusal of this `model`, completed by the `served` models; any other body is returned unchanged."""
    try:
        body = orjson.loads(content)
        said = body["error"]["message"]
        if "model" not in said or model not in said or all(name in said for name in served):
            return content
    except (ValueError, LookupError, TypeError):
        return content
    body["error"]["message"] = f"{said.rstrip('. ')}. Those that are served: {', '.join(served)}."
    return orjson.dumps(body)


# docs.anthropic.com, "Errors".
_ANTHROPIC_TYPES = {
    413: "request_too_large",
    500: "api_error",
    502: "api_error",
    503: "api_error",
    504: "timeout_error",
}


class BadRequest(GatewayError):
    """The request cannot be understood; `param` says which field."""

    status = 400
    type = "invalid_request_error"
    code = "bad_request"


class Rejected(BadRequest):
    """The request is well-formed, but exceeds a limit or lacks what its answer needs."""


class ForeignMedia(Rejected):
    """The request holds a URL whose host is not allowed."""


class Unauthorized(GatewayError):
    """The key is missing, or is not one of this gateway's keys."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    outcome = "refused"
    headers = ((b"www-authenticate", b"Bearer"),)


class ForeignPage(GatewayError):
    """A page of another origin sends a request for which its browser makes no preflight."""

    status = 403
    type = "permission_error"
    code = "foreign_page"
    outcome = "refused"


class NotFound(GatewayError):
    """No such path."""

    status = 404
    type = "not_found_error"
    code = "path_not_found"


class NotServed(NotFound):
    """The path is relayed, but the model's kind does not support it."""

    code = "path_not_served"


class ModelNotFound(NotFound):
    """No such model; type and code are OpenAI's for this case."""

    type = "invalid_request_error"
    code = "model_not_found"


class NoSuchResponse(NotFound):
    """The stored response belongs to another key or does not exist: the same bytes as vLLM's, to hide which it is."""

    type = "invalid_request_error"
    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id}' not found.")

    @property
    def answer_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """None: vLLM's answer has no further headers."""
        return ()

    def envelope(self, request_id: str, ends: Ends = "done") -> bytes:
        """As vLLM 0.32 writes it."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": "response_id",
            "code": self.status,
        }
        return orjson.dumps({"error": error})


class MethodNotAllowed(GatewayError):
    """The path is ours, the method is not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(GatewayError):
    """The request's body does not arrive, or arrives too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"
    outcome = "timeout:body"
    headers = ((b"connection", b"close"),)


class HeadTimeout(RequestTimeout):
    """The request's head did not arrive completely."""

    code = "head_timeout"
    outcome = "timeout:head"


class TooLarge(GatewayError):
    """The request's body is larger than the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Misdirected(GatewayError):
    """The request's Host is not a name of this gateway (RFC 9110, 15.5.20)."""

    status = 421
    type = "invalid_request_error"
    code = "misdirected_request"
    outcome = "refused"


class HeadTooLarge(GatewayError):
    """The request's head has too many headers, or too many bytes."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"
    headers = ((b"connection", b"close"),)


class UrlTooLong(GatewayError):
    """The request's target is longer than the limit."""

    status = 414
    type = "invalid_request_error"
    code = "url_too_long"


class UnsupportedEncoding(GatewayError):
    """The request's body is compressed."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"


class UnsupportedType(GatewayError):
    """The request's body has a content type that the path does not accept."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class TooMany(GatewayError):
    """There is no room for another request."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_requests"
    outcome = "refused"
    headers = ((b"retry-after", b"1"),)


class RateLimited(TooMany):
    """A key's requests of this minute are used up."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.headers = ((b"retry-after", b"%d" % retry_after),)


class Draining(GatewayError):
    """This gateway is shutting down; another may answer."""

    status = 503
    code = "draining"
    outcome = "drained"
    headers = ((b"retry-after", b"1"),)


class Shortage(GatewayError):
    """The gateway has no memory or no file descriptor left for the call; no upstream is at fault."""

    status = 503
    code = "gateway_shortage"
    outcome = "refused"
    headers = ((b"retry-after", b"1"),)


# The process or the system has no file descriptor left, or the system has no buffer space or memory left.
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_shortage(error: BaseException | None) -> bool:
    """Whether this error, or an error that caused it, is a shortage of the gateway's own resources."""
    seen: set[BaseException] = set()
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return True
        if isinstance(error, BaseExceptionGroup) and any(map(is_shortage, error.exceptions)):
            return True
        seen.add(error)
        error = error.__cause__ or error.__context__
    return False


class UpstreamError(GatewayError):
    """An upstream failed."""

    status = 502
    outcome = "upstream_error"


class UpstreamUnreachable(UpstreamError):
    """No connection to the upstream."""

    code = "upstream_unreachable"


class UpstreamBroken(UpstreamError):
    """The upstream's answer was cut short, or is not a valid answer."""

    code = "upstream_broken"


class UpstreamCompressed(UpstreamError):
    """The upstream's answer must be rewritten but is compressed; an intermediary before the upstream compresses it."""

    code = "upstream_compressed"

    def __init__(self, encoding: bytes) -> None:
        shown = encoding.decode("latin-1")[:40]
        super().__init__(
            f"The model server's answer is compressed ({shown!r}), which was not asked for, and cannot be rewritten: "
            "turn that off in what stands before it."
        )


class UpstreamRedirects(UpstreamError):
    """The upstream redirects. A redirect is not followed: it could send the call, and its key, to any host."""

    code = "upstream_redirects"

    def __init__(self, status: int) -> None:
        super().__init__(f"The model server answers {status}, {REDIRECT_ADVICE}.")


# The advice for an upstream that redirects. It omits the target, which would disclose the upstream's address.
REDIRECT_ADVICE = "a redirect, which is not followed: GATEWAY_UPSTREAMS must name the server that answers itself"


class UpstreamRefused(UpstreamError):
    """An upstream's refusal, to be sent in a stream that has begun; `content` is the body of the upstream's answer."""

    code = "upstream_refused"

    def __init__(self, status: int, content: bytes) -> None:
        try:
            told = orjson.loads(content)["error"]
            message, kind = str(told["message"]), str(told["type"])
        except (orjson.JSONDecodeError, LookupError, TypeError):
            message, kind, told = f"The model server answers {status}, and not with a stream.", self.type, {}
        super().__init__(message, param=told.get("param"))
        self.status = status
        self.type = kind
        self.code = told.get("code") or self.code


class UpstreamUnauthorized(UpstreamError):
    """The upstream refuses the gateway's own token, a renewed token included; the client's key is not involved."""

    code = "upstream_unauthorized"

    def __init__(self) -> None:
        super().__init__("The model server refuses the gateway's own token, and a new one, too.")


class NoneReady(UpstreamError):
    """No upstream is ready yet; a retry may soon succeed."""

    status = 503
    code = "no_upstream_ready"

    def __init__(self, message: str, *, retry_after: bytes = b"2") -> None:
        super().__init__(message)
        self.headers = ((b"retry-after", retry_after),)


class UpstreamTimeout(UpstreamError):
    """A time limit passed: `which` is connect, first_token, idle or total."""

    status = 504

    def __init__(self, which: Literal["connect", "first_token", "idle", "total"], seconds: float) -> None:
        super().__init__(f"{_WAITED_FOR[which]} within {seconds:g} s (GATEWAY_{which.upper()}_TIMEOUT).")
        self.code = f"{which}_timeout"
        self.outcome = f"timeout:{which}"


_WAITED_FOR = {
    "connect": "The model server took no connection",
    "first_token": "The model server sent no first token",
    "idle": "The model server sent nothing more",
    "total": "The model server did not finish its answer",
}

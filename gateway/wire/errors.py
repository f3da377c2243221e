"""The error tree, OpenAI's error envelope, and how an error ends a stream that has begun."""

from __future__ import annotations

import errno
from collections.abc import Collection
from typing import Literal

import orjson

from gateway.wire.sse import Ends

# The errors after which the same call may well succeed soon, by their codes: it has not begun, or another server takes
# it. OpenAI's and Anthropic's clients call again, twice, after each 408, 409, 429 and 5xx, unless `x-should-retry` says
# otherwise. After a time limit in which the model works that would be the same prompt, read anew, and the same time;
# and what is wrong with a call, or with this gateway, is wrong with the next one, too.
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
    """An answer of our own that is not 200; its text is the sentence that the client reads.

    `status` is the HTTP status, `type` and `code` are what the envelope says, `outcome` what the
    log says. `param` names the request's field that is wrong; `headers` are those of its kind.
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
        """What goes out with the answer."""
        return (*self.headers, _SHOULD_RETRY[self.code in RETRIED])

    def envelope(self, request_id: str, ends: Ends = "done") -> bytes:
        """OpenAI's error object, with the request id inside, as clients' error classes show that object.

        Anthropic's, where that is spoken, is the same but for one field more and other words for the type.
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
        """The error as a server-sent event, and the end of the stream, as vLLM itself does both.

        `number` is the event's own, where events have numbers.
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
    """For a body of more than so many bytes."""
    return TooLarge(f"The request's body must be at most {most} bytes (GATEWAY_MAX_BODY_BYTES).")


def naming_served(content: bytes, model: str, served: Collection[str]) -> bytes:
    """An upstream's refusal of this `model`, with all that are `served` where it lacks some; any other as it came."""
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
    """The request is well-formed, but is past a limit, or lacks what its answer needs."""


class ForeignMedia(Rejected):
    """A URL of a host that is not named."""


class Unauthorized(GatewayError):
    """A key is missing, or is none of this gateway's."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    outcome = "refused"
    headers = ((b"www-authenticate", b"Bearer"),)


class ForeignPage(GatewayError):
    """A page of another origin sends what its browser need not ask for."""

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
    """The path is relayed, but the model is of another kind."""

    code = "path_not_served"


class ModelNotFound(NotFound):
    """No such model, in OpenAI's words for it."""

    type = "invalid_request_error"
    code = "model_not_found"


class NoSuchResponse(NotFound):
    """A stored response of another key's, or of none: told in vLLM's own bytes, so that nobody learns which."""

    type = "invalid_request_error"
    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id}' not found.")

    @property
    def answer_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """None that vLLM's answer lacks."""
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
    """The request's body does not come, or too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"
    outcome = "timeout:body"
    headers = ((b"connection", b"close"),)


class HeadTimeout(RequestTimeout):
    """The request's head did not come whole."""

    code = "head_timeout"
    outcome = "timeout:head"


class TooLarge(GatewayError):
    """The request's body is larger than the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Misdirected(GatewayError):
    """The request is for a host by which nobody calls this gateway (RFC 9110, 15.5.20)."""

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
    """The request's body is of a type that the path does not take."""

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
    """This gateway ends; another may answer."""

    status = 503
    code = "draining"
    outcome = "drained"
    headers = ((b"retry-after", b"1"),)


class Shortage(GatewayError):
    """The gateway has no memory or no descriptor left for the call; that is no fault of an upstream's."""

    status = 503
    code = "gateway_shortage"
    outcome = "refused"
    headers = ((b"retry-after", b"1"),)


# What a system says when a process has as many descriptors, or it itself has, as may be, or when it has no room left.
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_shortage(error: BaseException | None) -> bool:
    """Whether a connection failed, here or in what led to this error, for want of what is ours to have."""
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
    """Something is wrong behind us."""

    status = 502
    outcome = "upstream_error"


class UpstreamUnreachable(UpstreamError):
    """No connection to the upstream."""

    code = "upstream_unreachable"


class UpstreamBroken(UpstreamError):
    """The upstream's answer broke off, or is none."""

    code = "upstream_broken"


class UpstreamCompressed(UpstreamError):
    """The upstream's answer has to be rewritten, and cannot be read; that is the doing of what stands between."""

    code = "upstream_compressed"

    def __init__(self, encoding: bytes) -> None:
        shown = encoding.decode("latin-1")[:40]
        super().__init__(
            f"The model server's answer is compressed ({shown!r}), which was not asked for, and cannot be rewritten: "
            "turn that off in what stands before it."
        )


class UpstreamRedirects(UpstreamError):
    """The upstream says that the call belongs elsewhere: to follow it would take the call, and its key, to anywhere."""

    code = "upstream_redirects"

    def __init__(self, status: int) -> None:
        super().__init__(f"The model server answers {status}, {REDIRECT_ADVICE}.")


# What is said of an upstream that redirects; not where to, as that would tell where it is.
REDIRECT_ADVICE = "a redirect, which is not followed: GATEWAY_UPSTREAMS must name the server that answers itself"


class UpstreamRefused(UpstreamError):
    """What an upstream has refused a call with, in a stream that has begun; `content` is the body of its answer."""

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
    """The upstream refuses the gateway's own token, however new it is; the client's key has no part in it."""

    code = "upstream_unauthorized"

    def __init__(self) -> None:
        super().__init__("The model server refuses the gateway's own token, and a new one, too.")


class NoneReady(UpstreamError):
    """No upstream is ready yet; worth another try soon."""

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

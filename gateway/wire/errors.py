"""The error tree, OpenAI's error envelope, and how an error ends a stream that has begun."""

from __future__ import annotations

from typing import Literal

import orjson

from gateway.wire.sse import Ends


class GatewayError(Exception):
    """An answer of our own that is not 200; its text is the sentence that the client reads.

    `status` is the HTTP status, `type` and `code` are what the envelope says, `outcome` what the
    log says. `param` names the request's field that is wrong; `headers` go out with the answer.
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


class Unauthorized(GatewayError):
    """A key is missing, or is none of this gateway's."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    outcome = "refused"
    headers = ((b"www-authenticate", b"Bearer"),)


class NotFound(GatewayError):
    """No such path."""

    status = 404
    type = "not_found_error"
    code = "path_not_found"


class ModelNotFound(NotFound):
    """A model that no upstream serves."""

    code = "model_not_found"


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

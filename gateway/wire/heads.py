"""Parsed heads of requests and answers, and which of their headers are forwarded in each direction."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Final

from gateway.wire.errors import BadRequest, GatewayError, HeadTooLarge, UnsupportedEncoding, UrlTooLong

Header = tuple[bytes, bytes]

# RFC 9110, 7.6.1, and the headers that older agents treat alike; `connection` names more of them.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

# Request headers that are not forwarded: the gateway writes them (host, length, id), handles them (expect; origin, as
# vLLM would let pages of every origin read its answer), or they are secrets between client and gateway.
NOT_TO_UPSTREAM: Final = HOP_BY_HOP | {
    b"api-key",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"origin",
    b"x-api-key",
    b"x-request-id",
}

# Request headers that vLLM 0.32 obeys. By these a client could choose the engine that takes its call, go before others,
# join their sessions or learn the server's load. The prefixes cover headers that later releases of vLLM may add, those
# that Amazon's containers of vLLM obey, and those of the Kubernetes Inference Gateway and llm-d, whose proxies call the
# host that a header names.
OBEYED: Final = frozenset({b"endpoint-load-metrics-format", b"x-session-id"})
_BEGINNINGS: Final = (
    b"proxy-",
    b"x-amzn-sagemaker-",
    b"x-data-parallel-",
    b"x-encoder-",
    b"x-gateway-",
    b"x-prefiller-",
    b"x-vllm-",
)

# Answer headers that are not forwarded. Both ways in write length, date, server and id alike, although RFC 9110, 6.6.1
# has a relay set a date only if there is none. The gateway, not the upstream, decides which pages may read the answer.
NOT_TO_CLIENT: Final = HOP_BY_HOP | {
    b"access-control-allow-credentials",
    b"access-control-allow-origin",
    b"access-control-expose-headers",
    b"content-length",
    b"date",
    b"server",
    b"x-request-id",
    # These tell the upstream's address, or another address to call instead of this gateway. Cookies, which would not
    # be sent back to the upstream, hold a domain or, if set by a load balancer, an address. A challenge concerns the
    # gateway's own key.
    b"alt-svc",
    b"content-location",
    b"forwarded",
    b"link",
    b"location",
    b"refresh",
    b"set-cookie",
    b"via",
    b"www-authenticate",
    b"x-backend-server",
    b"x-envoy-decorator-operation",
    b"x-forwarded-host",
    b"x-forwarded-server",
    b"x-served-by",
    b"x-upstream-addr",
    # The gateway's own headers, as set by another gateway behind this one.
    b"x-gateway-model",
    b"x-gateway-upstream",
}

# Asks for an uncompressed answer: without this header the upstream may use any coding (RFC 9110, 12.5.3).
UNCOMPRESSED: Final = b"accept-encoding: identity\r\n"

# The statuses that redirect a client; 304 (Not Modified) does not.
REDIRECTS: Final = frozenset({300, 301, 302, 303, 305, 306, 307, 308})

# RFC 9110, 7.2, without user information; underscores are allowed, as names of containers have them.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")

# Leading zeros are matched apart: there may be more of them than Python's int() accepts.
_LENGTH: Final = re.compile(rb"0*(\d{1,19})")

# HTTP/1.0 and 1.1, and the names that an ASGI server uses for HTTP/2 and HTTP/3. "2.0" in a request line is invalid.
_VERSIONS: Final = frozenset({"1.0", "1.1", "2", "3"})

_SANE_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


# A method implemented in C: a comprehension would cost one more call.
_AS_LINE: Final[Callable[[Header], bytes]] = b"%b: %b\r\n".__mod__


def lines(headers: list[Header]) -> bytes:
    """Each header as a line."""
    return b"".join(map(_AS_LINE, headers))


class RequestHead:
    """The parsed head of a request, without its target.

    `request_id` is the client's, if it is sane, and `names_itself` says that there is one. `length` is the
    content-length, 0 if it is missing or not a number. `encoding` is the content-encoding in lower case. `json` says
    whether the `content_type` is JSON; any other content type is left out of the lines. `lines` are the header lines
    for the upstream; if the answer is rewritten here, `UNCOMPRESSED` and `lines_rewritten` are sent instead. `origin`
    and `fetch_site` are what a browser says of the calling page, and `from_page` whether that page may be of another
    origin. `forwarded_for` is the value of X-Forwarded-For. `key` is the SHA-256 of the client's key, if any. `hosts`
    holds every Host value and `coding` the transfer-encoding, if any. `count` is the number of headers and `size` their
    bytes.
    """

    # The headers themselves are not kept: a connection holds this object for as long as it is open.
    __slots__ = (
        "coding",
        "content_type",
        "count",
        "encoding",
        "fetch_site",
        "forwarded_for",
        "from_page",
        "hosts",
        "json",
        "key",
        "length",
        "lines",
        "lines_rewritten",
        "names_itself",
        "origin",
        "request_id",
        "size",
    )

    def __init__(self, headers: list[Header], forwarded: frozenset[bytes] = frozenset()) -> None:
        """`headers` have names in lower case; those in `forwarded` are forwarded although vLLM obeys them."""
        known = by_name(headers)
        self.count = len(headers)
        self.size = sum([len(name) + len(value) + 4 for name, value in headers])
        self.hosts = known.get(b"host")
        self.coding = known.get(b"transfer-encoding")
        self.origin = known.get(b"origin")
        self.fetch_site = known.get(b"sec-fetch-site")
        self.from_page = self.origin is not None or self.fetch_site == b"cross-site"
        self.forwarded_for = known.get(b"x-forwarded-for", b"")
        self.request_id = sane_request_id(known.get(b"x-request-id"))
        self.names_itself = self.request_id is not None
        length = _LENGTH.fullmatch(known.get(b"content-length", b""))
        self.length = int(length[1]) if length else 0
        self.encoding = known.get(b"content-encoding", b"identity").lower()
        # Plain `curl -d` declares a form; vLLM accepts only the content type of JSON.
        self.content_type = known.get(b"content-type", b"")
        self.json = self.content_type[:16].lower() == b"application/json"
        dropped = not_forwarded(NOT_TO_UPSTREAM, known)
        if not self.json:
            dropped |= {b"content-type"}
        if obeyed := {name for name in known if name in OBEYED or name.startswith(_BEGINNINGS)}:
            dropped |= obeyed - forwarded
        bearer = known.get(b"authorization", b"")
        if bearer[:7].lower() == b"bearer ":
            secret: bytes | None = bearer[7:].strip()
        else:  # x-api-key is sent by Anthropic's clients, api-key by Azure's
            secret = known.get(b"x-api-key") or known.get(b"api-key")
        self.key = hashlib.sha256(secret).digest() if secret else None
        self.lines = self.lines_rewritten = lines([header for header in headers if header[0] not in dropped])
        if b"accept-encoding" in known:
            dropped |= {b"accept-encoding"}
            self.lines_rewritten = lines([header for header in headers if header[0] not in dropped])


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Limits of a head: its bytes, its headers and the bytes of its target, under the settings' names."""

    max_head_bytes: int
    max_headers: int
    max_url_bytes: int


def too_large(limits: HeadLimits) -> str:
    """The message for a head that has too many bytes."""
    return f"The request's head must be at most {limits.max_head_bytes} bytes (GATEWAY_MAX_HEAD_BYTES)."


def too_many(limits: HeadLimits) -> str:
    """The message for a head that has too many headers."""
    return f"The request must have at most {limits.max_headers} headers (GATEWAY_MAX_HEADERS)."


def fault_of(head: RequestHead, target: int, limits: HeadLimits, version: str) -> GatewayError | None:
    """Why this head is refused, None if it is not; `target` is the size of its target in bytes."""
    if version not in _VERSIONS:
        return BadRequest(f"The request must be of HTTP/1.1, but it is of HTTP/{version}.")
    old = version == "1.0"
    if head.hosts is None:
        if not old:
            return BadRequest("The request must name its Host once, but it names none.")
    elif not _HOST.fullmatch(head.hosts):
        shown = head.hosts[:60].decode("latin-1")
        return BadRequest(f"The request must name one Host, as HOST or HOST:PORT, but it is {shown!r}.")
    if head.coding is not None and old:
        return BadRequest("Transfer-Encoding must be absent in HTTP/1.0, which does not know it.")
    if head.coding is not None and head.coding.lower() != b"chunked":
        shown = head.coding[:60].decode("latin-1")
        return UnsupportedEncoding(f"Transfer-Encoding must be absent or chunked, but it is {shown!r}.")
    if target > limits.max_url_bytes:
        return UrlTooLong(f"The request's target must be at most {limits.max_url_bytes} bytes (GATEWAY_MAX_URL_BYTES).")
    if head.size + target > limits.max_head_bytes:
        return HeadTooLarge(too_large(limits))
    if head.count > limits.max_headers:
        return HeadTooLarge(too_many(limits))
    return None


class AnswerHead:
    """The head of an answer as it is sent to the client, without its length.

    `streams` says that the body is uncompressed server-sent events. `encoding` is the body's compression, if any.
    `closes` says that the connection ends with this answer. `lines` are the headers as written.
    """

    __slots__ = ("closes", "encoding", "headers", "lines", "status", "streams")

    def __init__(
        self,
        status: int,
        headers: list[Header],
        *,
        streams: bool = False,
        encoding: bytes = b"",
        behind: AnswerHead | None = None,
    ) -> None:
        """With `behind`, the headers follow those of that head, and only that head decides whether to close."""
        self.status = status
        self.streams = streams
        self.encoding = encoding
        if behind is None:
            self.headers = headers
            self.lines = b"".join(map(_AS_LINE, headers))
            self.closes = (b"connection", b"close") in headers
        else:
            self.headers = behind.headers + headers
            self.lines = behind.lines + b"".join(map(_AS_LINE, headers))
            self.closes = behind.closes


def answer_head(status: int, headers: list[Header]) -> tuple[AnswerHead, bytes | None]:
    """The forwarded part of an upstream's head, whose names are in lower case, and its content-length."""
    known = by_name(headers)
    dropped = not_forwarded(NOT_TO_CLIENT, known)
    # A compressed body cannot be read and is relayed unchanged.
    encoding = known.get(b"content-encoding", b"")
    if encoding.lower() == b"identity":
        encoding = b""
    streams = known.get(b"content-type", b"")[:17].lower() == b"text/event-stream" and not encoding
    kept = [header for header in headers if header[0] not in dropped]
    head = AnswerHead(status, kept, streams=streams, encoding=encoding)
    return head, known.get(b"content-length")


def by_name(headers: list[Header]) -> dict[bytes, bytes]:
    """The values by their lower-case names; repeated headers are joined by commas (RFC 9110, 5.3)."""
    known = dict(headers)
    if len(known) != len(headers):
        values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            values.setdefault(name, []).append(value)
        known = {name: b",".join(found) for name, found in values.items()}
    return known


def not_forwarded(names: frozenset[bytes], known: dict[bytes, bytes]) -> frozenset[bytes]:
    """The names of the headers that are not forwarded: `names`, and those that a `connection` header lists."""
    if b"connection" not in known:
        return names
    return names | {token.strip().lower() for token in known[b"connection"].split(b",")}


def new_request_id() -> str:
    """A new id: unique, but not secret."""
    return getrandbits(128).to_bytes(16).hex()


def sane_request_id(value: bytes | None) -> str | None:
    """The client's request id if it cannot harm a log line, a header or a metric, else None."""
    return value.decode() if value is not None and _SANE_REQUEST_ID.fullmatch(value) else None

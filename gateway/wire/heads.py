"""What is read of a head, and which of its headers go on, each way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Final

from gateway.wire.errors import BadRequest, GatewayError, HeadTooLarge, UnsupportedEncoding, UrlTooLong

Header = tuple[bytes, bytes]

# RFC 9110, 7.6.1, and those that older agents treat alike; `connection` names more of them.
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

# Of a request's: ours to write (host, length, id), answered here (expect, and origin, as vLLM would let the pages of
# every one read), or the client's secret and not the upstream's.
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

# Of a request's: those that vLLM 0.32 obeys, by which a client could choose the engine that takes its call, go before
# others, join their sessions or be told of the server's load. The beginnings cover what vLLM may name alike later, what
# Amazon's containers of it obey, and the Kubernetes Inference Gateway and llm-d, whose proxies call the host that a
# header names.
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

# Of an answer's: written alike by every way in; RFC 9110, 6.6.1 has the one that relays set a date only if there is
# none. Which pages may read it is not the upstream's to say.
NOT_TO_CLIENT: Final = HOP_BY_HOP | {
    b"access-control-allow-credentials",
    b"access-control-allow-origin",
    b"access-control-expose-headers",
    b"content-length",
    b"date",
    b"server",
    b"x-request-id",
    # Where the upstream is, or where else to go, past this gateway; cookies, which would not go back to it, hold a
    # domain or, of balancers, an address, and a challenge is for the gateway's own key.
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
    # Our own, of a gateway behind this one.
    b"x-gateway-model",
    b"x-gateway-upstream",
}

# Asks for an answer that can be read: where nothing is said of it, any coding would do (RFC 9110, 12.5.3).
UNCOMPRESSED: Final = b"accept-encoding: identity\r\n"

# What sends a client elsewhere; a 304 (Not Modified) does not.
REDIRECTS: Final = frozenset({300, 301, 302, 303, 305, 306, 307, 308})

# RFC 9110, 7.2, without user information; with the underscores that containers' names have.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")

# Zeros may stand before it, more than Python reads.
_LENGTH: Final = re.compile(rb"0*(\d{1,19})")

# HTTP/1.1's, and those that an ASGI server calls so which really speaks them; in a request line 2.0 is nobody's.
_VERSIONS: Final = frozenset({"1.0", "1.1", "2", "3"})

_SANE_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


# Of C, as a comprehension is a call more.
_AS_LINE: Final[Callable[[Header], bytes]] = b"%b: %b\r\n".__mod__


def lines(headers: list[Header]) -> bytes:
    """Each header as a line."""
    return b"".join(map(_AS_LINE, headers))


class RequestHead:
    """What is read of a request's head but for its target.

    `request_id` is the client's, where it is sane, and `names_itself` says that there was one. `length` is what
    content-length says, 0 where it is missing or no number. `encoding` is the body's, in lower case, `json` whether its
    `content_type` says that it is JSON; else that one is not among the lines. `lines` is what goes to the upstream;
    where the answer is rewritten here it is `UNCOMPRESSED` and `lines_rewritten`. `origin` and `fetch_site` are what a
    browser says of the page that asks, `from_page` whether that may be one of another origin. `forwarded_for` is whom
    proxies say that they asked for. `key` is the SHA-256 of the key that it brings, if any; `hosts` is all that stands
    for a host, `coding` the body's on its way, if it says one, `count` how many headers there are and `size` their
    bytes.
    """

    # None of the headers themselves: a connection keeps this for as long as it is open.
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
        """`headers` have names in lower case; `forwarded` are those that go on though vLLM obeys them."""
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
        # Plain `curl -d` says that it sends a form; vLLM takes nothing but JSON's own type.
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
        else:  # Anthropic's clients send the first, Azure's the second
            secret = known.get(b"x-api-key") or known.get(b"api-key")
        self.key = hashlib.sha256(secret).digest() if secret else None
        self.lines = self.lines_rewritten = lines([header for header in headers if header[0] not in dropped])
        if b"accept-encoding" in known:
            dropped |= {b"accept-encoding"}
            self.lines_rewritten = lines([header for header in headers if header[0] not in dropped])


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """The most bytes of a head, the most headers, and the most bytes of a target, by the settings' names."""

    max_head_bytes: int
    max_headers: int
    max_url_bytes: int


def too_large(limits: HeadLimits) -> str:
    """What is said of a head that has too many bytes."""
    return f"The request's head must be at most {limits.max_head_bytes} bytes (GATEWAY_MAX_HEAD_BYTES)."


def too_many(limits: HeadLimits) -> str:
    """What is said of a head that has too many headers."""
    return f"The request must have at most {limits.max_headers} headers (GATEWAY_MAX_HEADERS)."


def fault_of(head: RequestHead, target: int, limits: HeadLimits, version: str) -> GatewayError | None:
    """Why a head of this version of HTTP is refused, whose target has so many bytes."""
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
    """What goes to the client of an answer's head, but for its length.

    `streams` says that the body is server-sent events that can be read, `encoding` how it is compressed, if it is,
    `closes` that the connection ends with it. `lines` are the headers as they are written.
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
        """The headers stand behind those of another head, `behind`, if any: none of them then ends the connection."""
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
    """What goes on of an upstream's head, whose names are in lower case, and its content-length."""
    known = by_name(headers)
    dropped = not_forwarded(NOT_TO_CLIENT, known)
    # What is compressed cannot be read, and is relayed as the bytes that it is.
    encoding = known.get(b"content-encoding", b"")
    if encoding.lower() == b"identity":
        encoding = b""
    streams = known.get(b"content-type", b"")[:17].lower() == b"text/event-stream" and not encoding
    kept = [header for header in headers if header[0] not in dropped]
    head = AnswerHead(status, kept, streams=streams, encoding=encoding)
    return head, known.get(b"content-length")


def by_name(headers: list[Header]) -> dict[bytes, bytes]:
    """The values by their names, which are lower-case; repeated ones joined by commas, as RFC 9110, 5.3 has it."""
    known = dict(headers)
    if len(known) != len(headers):
        values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            values.setdefault(name, []).append(value)
        known = {name: b",".join(found) for name, found in values.items()}
    return known


def not_forwarded(names: frozenset[bytes], known: dict[bytes, bytes]) -> frozenset[bytes]:
    """The names of those that do not go on: `names`, and what `connection` names of the `known` ones."""
    if b"connection" not in known:
        return names
    return names | {token.strip().lower() for token in known[b"connection"].split(b",")}


def new_request_id() -> str:
    """Unique, but no secret."""
    return getrandbits(128).to_bytes(16).hex()


def sane_request_id(value: bytes | None) -> str | None:
    """The client's request id where it cannot harm a log line, a header or a metric, else None."""
    return value.decode() if value is not None and _SANE_REQUEST_ID.fullmatch(value) else None

"""Which headers are forwarded, each way, and what a request id may look like."""

from __future__ import annotations

import re
from collections.abc import Iterable

Header = tuple[bytes, bytes]

# RFC 9110, 7.6.1, and those that older agents treat alike; `connection` names more of them.
HOP_BY_HOP = frozenset(
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

# Ours to write (host, length, id), answered here (expect), or the client's secret and not the upstream's.
_NOT_UPSTREAM = HOP_BY_HOP | {
    b"api-key",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    b"x-request-id",
}

# Written alike by every way in; RFC 9110, 6.6.1 has the one that relays set a date only if there is none.
_NOT_TO_CLIENT = HOP_BY_HOP | {b"date", b"server", b"x-request-id"}

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def _named_in_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    return frozenset(
        token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")
    )


def to_upstream(headers: Iterable[Header]) -> list[Header]:
    """The client's headers that go on to the upstream; names are lower-case."""
    headers = list(headers)
    dropped = _NOT_UPSTREAM | _named_in_connection(headers)
    return [header for header in headers if header[0] not in dropped]


def to_client(headers: Iterable[Header]) -> list[Header]:
    """The upstream's headers that go on to the client; names are lower-case."""
    headers = list(headers)
    dropped = _NOT_TO_CLIENT | _named_in_connection(headers)
    return [header for header in headers if header[0] not in dropped]


def value_of(headers: Iterable[Header], name: bytes) -> bytes | None:
    """The value of a header that may stand there once; None where it is absent or repeated."""
    values = [value for header, value in headers if header == name]
    return values[0] if len(values) == 1 else None


def sane_request_id(headers: Iterable[Header]) -> str | None:
    """The client's request id where it cannot harm a log line, a header or a metric, else None."""
    value = value_of(headers, b"x-request-id")
    return value.decode() if value is not None and _SANE_REQUEST_ID.fullmatch(value) else None

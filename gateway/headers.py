"""Which headers are forwarded, each way, and what a request id may look like."""

from __future__ import annotations

import re

Header = tuple[bytes, bytes]

# A header as a line; mapped over a list, it costs no call of ours.
LINE = b"%b: %b\r\n".__mod__

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

# Of a request's: ours to write (host, length, id), answered here (expect), or the client's secret and not the
# upstream's.
NOT_TO_UPSTREAM = HOP_BY_HOP | {
    b"api-key",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    b"x-request-id",
}

# Of an answer's: written alike by every way in; RFC 9110, 6.6.1 has the one that relays set a date only if there is
# none.
NOT_TO_CLIENT = HOP_BY_HOP | {b"date", b"server", b"x-request-id"}

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def by_name(headers: list[Header]) -> dict[bytes, bytes]:
    """The values by their names, which are lower-case; repeated ones joined by commas, as RFC 9110, 5.3 has it."""
    known = dict(headers)
    if len(known) != len(headers):
        known.clear()
        for name, value in headers:
            known[name] = known[name] + b"," + value if name in known else value
    return known


def forwarded(headers: list[Header], known: dict[bytes, bytes], dropped: frozenset[bytes]) -> list[Header]:
    """Those that go on; `known` is what `by_name` made of them, `dropped` NOT_TO_UPSTREAM or NOT_TO_CLIENT."""
    if b"connection" in known:
        dropped |= {token.strip().lower() for token in known[b"connection"].split(b",")}
    return [header for header in headers if header[0] not in dropped]


def sane_request_id(value: bytes | None) -> str | None:
    """The client's request id where it cannot harm a log line, a header or a metric, else None."""
    return value.decode() if value is not None and _SANE_REQUEST_ID.fullmatch(value) else None

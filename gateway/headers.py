"""Which headers are forwarded, each way, and what a request id may look like."""

from __future__ import annotations

import re

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

# What is done with a header by its name: True, it is read here and goes on; False, it goes no further; others
# just go on.
_OF_REQUESTS = dict.fromkeys(HOP_BY_HOP, False)
# Ours to write (host, length, id), answered here (expect), or the client's secret and not the upstream's.
_OF_REQUESTS |= {
    b"api-key": False,
    b"authorization": False,
    b"content-encoding": True,
    b"content-length": False,
    b"content-type": True,
    b"cookie": False,
    b"expect": False,
    b"host": False,
    b"x-api-key": False,
    b"x-request-id": False,
}

_OF_ANSWERS = dict.fromkeys(HOP_BY_HOP, False)
# Written alike by every way in; RFC 9110, 6.6.1 has the one that relays set a date only if there is none.
_OF_ANSWERS |= {b"date": False, b"server": False, b"x-request-id": False}
_OF_ANSWERS |= {b"content-type": True, b"content-encoding": True}

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

Sorted = tuple[dict[bytes, bytes], list[Header]]


def sort_request(headers: list[Header]) -> Sorted:
    """The client's headers: those read here, by name, and those that go on to the upstream.

    Names are lower-case; of one that is repeated the values are joined by commas, as RFC 9110, 5.3 has it.
    """
    return _sort(headers, _OF_REQUESTS)


def sort_answer(headers: list[Header]) -> Sorted:
    """The upstream's headers: those read here, by name, and those that go on to the client; else as above."""
    return _sort(headers, _OF_ANSWERS)


def _sort(headers: list[Header], rules: dict[bytes, bool]) -> Sorted:
    known: dict[bytes, bytes] = {}
    passed = []
    for header in headers:
        name, value = header
        goes_on = rules.get(name)
        if goes_on is not None:
            known[name] = known[name] + b"," + value if name in known else value
        if goes_on is not False:
            passed.append(header)
    if b"connection" in known:
        named = {token.strip().lower() for token in known[b"connection"].split(b",")}
        passed = [header for header in passed if header[0] not in named]
    return known, passed


def sane_request_id(value: bytes | None) -> str | None:
    """The client's request id where it cannot harm a log line, a header or a metric, else None."""
    return value.decode() if value is not None and _SANE_REQUEST_ID.fullmatch(value) else None

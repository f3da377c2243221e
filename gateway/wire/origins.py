"""Which Host a request may name, and which origins' pages may send requests that need no preflight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gateway.wire.errors import ForeignPage, Misdirected
from gateway.wire.heads import RequestHead

_ANY = b"*"


def host_check(names: Iterable[str]) -> Callable[[bytes], object]:
    """A check whether a Host is localhost, an IP literal or one of these `names`, with or without a port.

    Any other name may be an attacker's domain that resolves to this gateway, so that the attacker's pages have the
    gateway's origin (DNS rebinding). The result is the method of a compiled pattern: a request pays for no call of a
    Python function.
    """
    named = "|".join(map(re.escape, ("localhost", *names)))
    pattern = rf"(?:{named}|\d{{1,3}}(?:\.\d{{1,3}}){{3}}|\[[0-9a-f:.]+\])\.?(?::\d+)?"
    return re.compile(pattern.encode(), re.IGNORECASE).fullmatch


def misdirected(host: bytes) -> Misdirected:
    """The error for a Host that the check rejects."""
    shown = host[:60].decode("latin-1")
    return Misdirected(f"The Host must be localhost, an address or one of GATEWAY_ALLOWED_HOSTS, but it is {shown!r}.")


def page_fault(head: RequestHead, origins: frozenset[bytes]) -> ForeignPage | None:
    """Why a page's call is refused: its origin is neither the gateway's own nor in `origins`, which may hold `*`.

    JSON passes, because a browser makes a preflight before it sends JSON to another origin (Fetch, "CORS-safelisted
    request-header"). It sends forms, links and images without a preflight.
    """
    if not head.from_page or head.json or _ANY in origins or head.origin in origins:
        return None
    # Fetch Metadata is set by the browser and stays true behind a proxy that changes Host. Without it Origin is used.
    if head.fetch_site in (b"same-origin", b"none"):
        return None
    own = head.origin is not None and head.origin.partition(b"://")[2].lower() == (head.hosts or b"").lower()
    if own and head.fetch_site != b"cross-site":
        return None
    return ForeignPage(
        "A page of another origin may call where GATEWAY_CORS_ORIGINS names its origin; else with a body of "
        "Content-Type application/json, of which its browser asks first."
    )

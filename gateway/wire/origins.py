"""By which host a request may call the gateway, and which origins' pages may send it what they need not ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gateway.wire.errors import ForeignPage, Misdirected
from gateway.wire.heads import RequestHead

_ANY = b"*"


def host_check(names: Iterable[str]) -> Callable[[bytes], object]:
    """What says whether a Host is localhost, an IP literal or one of these `names`, with or without a port.

    Any other name may be of somebody's domain, which leads here so that its pages have this gateway's origin (DNS
    rebinding). The result is a compiled pattern's method, which costs a request no call of Python's.
    """
    named = "|".join(map(re.escape, ("localhost", *names)))
    pattern = rf"(?:{named}|\d{{1,3}}(?:\.\d{{1,3}}){{3}}|\[[0-9a-f:.]+\])\.?(?::\d+)?"
    return re.compile(pattern.encode(), re.IGNORECASE).fullmatch


def misdirected(host: bytes) -> Misdirected:
    """What is said of a host that the check does not take."""
    shown = host[:60].decode("latin-1")
    return Misdirected(f"The Host must be localhost, an address or one of GATEWAY_ALLOWED_HOSTS, but it is {shown!r}.")


def page_fault(head: RequestHead, origins: frozenset[bytes]) -> ForeignPage | None:
    """Why a page's call is refused: its origin is neither the gateway's own nor among `origins`, which `*` may be in.

    JSON passes, as a browser asks before it sends that to another origin (Fetch, "CORS-safelisted request-header");
    forms, links and images it sends unasked.
    """
    if not head.from_page or head.json or _ANY in origins or head.origin in origins:
        return None
    # Fetch Metadata is the browser's own word, and holds behind a proxy that changes Host; where it lacks, Origin is.
    if head.fetch_site in (b"same-origin", b"none"):
        return None
    own = head.origin is not None and head.origin.partition(b"://")[2].lower() == (head.hosts or b"").lower()
    if own and head.fetch_site != b"cross-site":
        return None
    return ForeignPage(
        "A page of another origin may call where GATEWAY_CORS_ORIGINS names its origin; else with a body of "
        "Content-Type application/json, of which its browser asks first."
    )

"""Checks and normalizes the URLs of other servers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def base_url(url: str) -> str:
    """`http://host:port[/prefix]`, without the `/v1` that some configurations carry. Raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("URLs like http://host:8008, separated by commas") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise ValueError("URLs like http://host:8008, separated by commas")
    if parts.username or parts.password:
        raise ValueError("URLs without a user or password; set GATEWAY_UPSTREAM_API_KEY for a key")
    if not re.fullmatch(r"[A-Za-z0-9._:\-\[\]]+", parts.netloc) or not re.fullmatch(r"[!-~]*", parts.path):
        raise ValueError("URLs of plain ASCII characters")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def upstream_url(url: str) -> str:
    """A base URL, or `dns+` and one: then each address of its host is a server. Raises ValueError."""
    rest = url.removeprefix("dns+")
    found = base_url(rest)
    if rest == url:
        return found
    host = urlsplit(rest).hostname or ""
    if ":" in host or re.fullmatch(r"[\d.]+", host):
        raise ValueError("a name after dns+, whose addresses are asked for: an address needs no dns+")
    if len(host) > 253 or not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise ValueError("a name after dns+ that there can be: 1 to 63 characters between its dots, 253 in all")
    return f"dns+{found}"


def token_url(url: str) -> str:
    """`https://host[:port]/path[?query]`; RFC 6749, 3.2: without a fragment."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("a URL like https://login.example.com/token") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "#" in url or port == 0:
        raise ValueError("a URL like https://login.example.com/token")
    if "@" in parts.netloc:
        raise ValueError("a URL without a user or password; set GATEWAY_UPSTREAM_CLIENT_ID and _SECRET")
    if not re.fullmatch(r"[!-~]+", url):
        raise ValueError("a URL of plain ASCII characters")
    return f"{parts.scheme}{url[len(parts.scheme) :]}"


def authority(host: str, port: int) -> str:
    """`host:port` as in a URL, with an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this host."""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))

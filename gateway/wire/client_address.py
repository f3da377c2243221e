"""The client's address: the peer of the connection, or the peer that trusted proxies report."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Network = IPv4Network | IPv6Network

# The longest chain of proxies that is followed: a client may have invented the addresses before these.
_MOST_PROXIES: Final = 16
# Some proxies add the port.
_WITH_PORT: Final = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+):\d+")
# Prefix length of an IPv6 network: a customer has at least a /64 and could send each call from another address of it.
_CUSTOMERS_OWN: Final = 64


def client_address(peer: str, forwarded_for: bytes, trusted: tuple[Network, ...]) -> str:
    """The last address before the gateway that is not a trusted proxy's: `peer`, or an entry of X-Forwarded-For.

    Each proxy appends its own peer to the header. The entries before the last untrusted address may be invented.
    """
    found = peer
    named = forwarded_for.decode("latin-1").rsplit(",", _MOST_PROXIES)[-_MOST_PROXIES:]
    while named and (address := _parse(found)) and any(address in network for network in trusted):
        before = _parse(named.pop())
        if before is None:
            break
        found = str(before)
    return found


def is_trusted(address: str, trusted: tuple[Network, ...]) -> bool:
    """Whether `address` belongs to a trusted proxy."""
    parsed = _parse(address)
    return parsed is not None and any(parsed in network for network in trusted)


def household(address: str) -> str:
    """The unit of fair queueing: an IPv4 address, or the network of an IPv6 address; other text is returned as is."""
    parsed = _parse(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, _CUSTOMERS_OWN), strict=False))
    return str(parsed or address)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    text = text.strip()
    if with_port := _WITH_PORT.fullmatch(text):
        text = with_port[1] or with_port[2]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address

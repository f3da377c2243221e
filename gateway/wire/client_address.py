"""Who calls, by address: the peer of the connection, or whom trusted proxies name as theirs."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Network = IPv4Network | IPv6Network

# Proxies stand behind each other, but no more than this: what else a header says is the client's own invention.
_MOST_PROXIES: Final = 16
# Some proxies add the port.
_WITH_PORT: Final = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+):\d+")
# A customer of IPv6 has a network of at least so many addresses, and one call from each.
_CUSTOMERS_OWN: Final = 64


def client_address(peer: str, forwarded_for: bytes, trusted: tuple[Network, ...]) -> str:
    """The last address on the way here that is no trusted proxy's: `peer`, or one of X-Forwarded-For's.

    Each proxy adds its own peer at the header's end, so that whatever stands before the first that is not trusted
    may be invented.
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
    """Whether an address is a trusted proxy's."""
    parsed = _parse(address)
    return parsed is not None and any(parsed in network for network in trusted)


def household(address: str) -> str:
    """What shares one turn: an IPv4 address, or the network of an IPv6 one; other text as it is."""
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

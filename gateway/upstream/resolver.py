"""Resolves upstreams' names: one lookup per name at a time, without threads; addresses are kept if lookups fail."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

_log = logging.getLogger(__name__)

# As returned by getaddrinfo: family, type, protocol, canonical name and socket address.
Address = tuple[int, int, int, str, tuple[Any, ...]]

# Seconds after which a name is looked up again, and for which old addresses are used while lookups fail.
_FRESH = 5.0
_KEPT = 300.0
# Seconds until a failed lookup is retried: a container's name resolves once the container runs. After a timeout the
# pauses grow, from the first to the second of `_RESTS`.
_AGAIN = 1.0
_PATIENCE = 5.0
_RESTS = (2.0, 30.0)
# The c-ares resolver, with its cache, is replaced after so many seconds.
_CACHED = 0.5
# An address counts as its name's for so many seconds after the last answer with it: some servers return a different
# subset of many addresses each time.
_OWN_FOR = 10.0


class NameNotFound(OSError):
    """The name has no known address; the text says why."""


class Lookup(Protocol):
    """Looks up addresses."""

    async def find(self, host: str, family: int) -> list[str]:
        """A host's addresses of this family, any family for AF_UNSPEC; raises an error that says why there are none."""

    async def close(self) -> None:
        """Cancel all lookups."""


@dataclass(slots=True)
class _Name:
    """The state of a name. `seen` is when each address was last in an answer; lookups go on while `wanted`."""

    addresses: list[str] = field(default_factory=list)
    answered_at: float = -math.inf
    seen: dict[str, float] = field(default_factory=dict)
    why: str = ""
    rest: float = 0.0
    lookup: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    wanted: bool = True


class Resolver:
    """Resolves names to addresses, on the event loop that runs when it is created.

    `gone` holds pairs of a host and an address that the host no longer has.
    """

    def __init__(self, lookup: Lookup | None = None) -> None:
        """`lookup` resolves names; None if all hosts are addresses."""
        self.gone: set[tuple[str, str]] = set()
        self.on_gone: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._lookup = lookup
        self._names: dict[str, _Name] = {}

    async def addresses(self, host: str, port: int) -> list[Address]:
        """The addresses of `host`; raises NameNotFound. Waits for the running lookup only if none is known."""
        if _is_address(host):
            return [_address(host, port)]
        name = self._names.get(host)
        if name is None:
            name = self._names[host] = _Name()
            self._ask(host, name)
        name.wanted = True
        if name.lookup is not None and not self._is_known(name):
            await asyncio.shield(name.lookup)  # others wait for it, too
        if not self._is_known(name):
            raise NameNotFound(name.why)
        return [_address(address, port) for address in name.addresses]

    def forget(self, host: str) -> None:
        """Stop looking this name up, until `addresses` asks for it again."""
        if (name := self._names.get(host)) is None:
            return
        name.wanted = False
        if name.lookup is None:  # else it is dropped when the lookup ends
            self._drop(host, name)

    def _drop(self, host: str, name: _Name) -> None:
        if name.timer is not None:
            name.timer.cancel()
        del self._names[host]
        self.gone -= {one for one in self.gone if one[0] == host}

    def _is_known(self, name: _Name) -> bool:
        return self._loop.time() - name.answered_at < _KEPT

    def _ask(self, host: str, name: _Name) -> None:
        name.lookup = self._loop.create_task(self._look_up(host, name))

    async def _look_up(self, host: str, name: _Name) -> None:
        rest = _AGAIN
        try:
            assert self._lookup is not None, f"{host!r} is no address"
            async with asyncio.timeout(_PATIENCE):
                found = await self._lookup.find(host, socket.AF_UNSPEC)
            self._found(host, name, found)
            rest = _FRESH
        except TimeoutError:
            rest = name.rest = min(max(_RESTS[0], 2 * name.rest), _RESTS[1])
            self._failed(host, name, f"its name is not resolved within {_PATIENCE:g} s")
        except Exception as error:
            self._failed(host, name, f"its name leads to no address ({str(error.args[-1]).lower()})")
        finally:
            name.lookup = name.timer = None
            if name.wanted:
                name.timer = self._loop.call_later(rest, self._ask, host, name)
            else:
                self._drop(host, name)

    def _failed(self, host: str, name: _Name, why: str) -> None:
        if why != name.why:
            kept = "; its last addresses are kept" if self._is_known(name) else ""
            _log.warning("upstream host %s: %s%s", host, why, kept)
        name.why = why

    def _found(self, host: str, name: _Name, addresses: list[str]) -> None:
        if not addresses:
            raise NameNotFound("no data")
        now = name.answered_at = self._loop.time()
        name.addresses = list(dict.fromkeys(addresses))
        name.seen |= dict.fromkeys(addresses, now)
        name.why, name.rest = "", 0.0
        gone = {address for address, seen in name.seen.items() if now - seen >= _OWN_FOR}
        for address in gone:
            del name.seen[address]
        self.gone.difference_update((host, address) for address in addresses)
        self.gone.update((host, address) for address in gone)
        if gone and self.on_gone is not None:
            self.on_gone()

    async def close(self) -> None:
        """Cancel all lookups and timers."""
        lookups = [name.lookup for name in self._names.values() if name.lookup is not None]
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        for name in self._names.values():
            if name.timer is not None:
                name.timer.cancel()
        if self._lookup is not None:
            await self._lookup.close()


class SystemLookup:
    """Lookups by c-ares, as resolv.conf and the hosts file say, on the event loop that runs at the lookup.

    c-ares caches answers for their TTL, and an answer without addresses for an hour (c-ares/c-ares#1293). A headless
    Service that had no ready pod would stay without addresses. So the resolver is replaced often, which also reads
    resolv.conf again.
    """

    def __init__(self) -> None:
        # Imported here: it takes a third of a second, not needed if all upstreams are addresses.
        import aiodns

        self._make = partial(aiodns.DNSResolver, timeout=_PATIENCE / 2, tries=2)
        self._made_at = -math.inf
        self._resolver: Any = None

    async def find(self, host: str, family: int) -> list[str]:
        """Look up by c-ares's getaddrinfo, which reads the hosts file, `search` and `ndots`."""
        now = asyncio.get_running_loop().time()
        if now - self._made_at >= _CACHED:
            self._made_at, self._resolver = now, self._make()
        # The previous resolver closes by itself once its lookups have ended.
        resolver = self._resolver
        answer = await resolver.getaddrinfo(host, family=socket.AddressFamily(family), type=socket.SOCK_STREAM)
        # Addresses from the hosts file are str.
        return [one.decode() if isinstance(one := node.addr[0], bytes) else one for node in answer.nodes]

    async def close(self) -> None:
        """Cancel all lookups."""
        if self._resolver is not None:
            await self._resolver.close()


def system_lookup(hosts: Iterable[str]) -> Lookup | None:
    """A lookup for these hosts; None if all of them are addresses."""
    return None if all(map(_is_address, hosts)) else SystemLookup()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _address(address: str, port: int) -> Address:
    if ":" not in address:
        return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
    plain, _, scope = address.partition("%")
    index = socket.if_nametoindex(scope) if scope else 0
    return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (plain, port, 0, index))

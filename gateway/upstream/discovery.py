"""Upstreams that come and go: each address of a name is one, as of a headless Service or of Compose's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from urllib.parse import urlsplit

from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.upstream.resolver import Lookup

_log = logging.getLogger(__name__)

# What a URL begins with each address of whose host is an upstream.
BY_NAME = "dns+"
# How long a lookup may take, and how long a start waits for the first of all, in seconds.
_PATIENCE = 5.0
_EAGER = 1.0


class Discovery:
    """Keeps the pool's upstreams those that the URLs lead to; one that begins with `dns+` to each of its addresses.

    `changed` is called with those that came and those that are gone: calls that run there end, and no new ones begin.
    """

    def __init__(
        self,
        urls: Sequence[str],
        pool: UpstreamPool,
        lookup: Lookup | None,
        interval: float,
        changed: Callable[[list[Upstream], list[Upstream]], None],
    ) -> None:
        """`lookup` asks for names, anew after so many seconds; None where no URL is of a name's addresses."""
        self._pool = pool
        self._lookup = lookup
        self._interval = interval
        self._changed = changed
        self._found: dict[str, list[str]] = {url: [] if url.startswith(BY_NAME) else [url] for url in urls}
        self._why: dict[str, str] = {}
        self._known: dict[str, Upstream] = {}

    @contextlib.asynccontextmanager
    async def discovering(self) -> AsyncIterator[None]:
        """For as long as the context lasts; it begins when all names were asked for once, or a second has passed."""
        self._update()
        names = [url for url in self._found if url.startswith(BY_NAME)]
        watches = [asyncio.create_task(self._watch(url)) for url in names]
        try:
            if names:
                firsts = [asyncio.create_task(self._ask(url)) for url in names]
                watches += firsts
                await asyncio.wait(firsts, timeout=_EAGER)
            yield
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            if self._lookup is not None:
                await self._lookup.close()

    async def _watch(self, url: str) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._ask(url)
            except Exception:
                # A bug of ours, which must not be the end of all lookups.
                _log.exception("the addresses of %s could not be asked for", url)

    async def _ask(self, url: str) -> None:
        """Ask once; the last answer stays where there is none, or an empty one."""
        host = urlsplit(url).hostname or ""
        try:
            async with asyncio.timeout(_PATIENCE):
                # Of both a server with both would be two. Whoever has A records has them for all.
                found, why = await self._addresses(host, socket.AF_INET)
                if not found:
                    found, _ = await self._addresses(host, socket.AF_INET6)
        except TimeoutError:
            found, why = [], f"no answer within {_PATIENCE:g} s"
        if not found:
            if why != self._why.get(url):
                kept = "; its last addresses are kept" if self._found[url] else ""
                _log.warning("%s leads to no upstream: %s%s", url, why, kept)
            self._why[url] = why
            return
        if self._why.pop(url, None) is not None:
            _log.info("%s leads to upstreams again", url)
        if found != self._found[url]:
            self._found[url] = found
            self._update()

    async def _addresses(self, host: str, family: int) -> tuple[list[str], str]:
        """In an order of their own, as that of an answer changes; or why there are none."""
        assert self._lookup is not None
        try:
            found = set(await self._lookup.find(host, family))
        except OSError as error:
            return [], str(error)
        except Exception as error:
            return [], str(error.args[-1]).lower()
        return sorted(found, key=lambda address: ipaddress.ip_address(address.partition("%")[0]).packed), "no address"

    def _update(self) -> None:
        """The pool's upstreams are those that are known now; an address that two URLs lead to is one."""
        wanted: dict[str, Upstream] = {}
        for url, found in self._found.items():
            for one in found:
                made = Upstream.from_url(url.removeprefix(BY_NAME), at=one if url.startswith(BY_NAME) else None)
                wanted.setdefault(made.url, self._known.get(made.url, made))
        came = [upstream for url, upstream in wanted.items() if url not in self._known]
        gone = [upstream for url, upstream in self._known.items() if url not in wanted]
        self._known = wanted
        for upstream in gone:
            upstream.gone = True
        self._pool.replace(tuple(wanted.values()))
        if came or gone:
            self._changed(came, gone)

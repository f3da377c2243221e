"""Upstreams that come and go: each address of a name is one, as of a headless Service or of Compose's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.upstream.resolver import Lookup

_log = logging.getLogger(__name__)

# What a URL begins with each address of whose host is an upstream.
BY_NAME = "dns+"
# How long a lookup may take, and how long a start waits for the first of all, in seconds.
_PATIENCE = 5.0
_EAGER = 1.0
# More addresses of a name than the first are told of, as so many upstreams are each probed but rarely; more than the
# second are not used, as nobody has so many, and each costs memory, a connection and metrics.
_MANY, _MOST = 256, 1024
# What c-ares says where a name has no address of a family (ENODATA, ENOTFOUND), and not that it could not ask.
_HAS_NONE = (1, 4)


@dataclass(frozen=True, slots=True)
class Source:
    """What leads to an upstream, or, where its URL begins with `dns+`, to one at each address, and how they are called.

    `named_by` is what has the source, as a setting or a file. `weight` is its part of calls beside others', `models`
    are those that it may be asked for, None for all. `authorization` is what it is shown, None for what all are;
    `trust` says whose certificates it may show, None likewise. `drains`: it gets no new calls.
    """

    url: str
    named_by: str = ""
    weight: float = 1.0
    models: frozenset[str] | None = None
    authorization: str | None = field(default=None, repr=False)
    trust: object | None = field(default=None, repr=False)
    drains: bool = False


class Discovery:
    """Keeps the pool's upstreams those that its sources lead to, one for each address.

    `changed` is called with those that came, those that are gone, where calls that run end and no new ones begin, and
    those of which another certificate is to be asked for.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        pool: UpstreamPool,
        lookup: Callable[[], Lookup],
        interval: float,
        changed: Callable[[list[Upstream], list[Upstream], list[Upstream]], None],
    ) -> None:
        """`lookup` makes what asks for names, anew after so many seconds, once there is one to ask for."""
        self._pool = pool
        self._make_lookup = lookup
        self._lookup: Lookup | None = None
        self._interval = interval
        self._changed = changed
        self._sources = sources
        self._found: dict[str, list[str]] = {}
        self._why: dict[str, str] = {}
        self._many: set[str] = set()
        self._known: dict[str, Upstream] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[str, asyncio.Event] = {}

    @contextlib.asynccontextmanager
    async def discovering(self) -> AsyncIterator[None]:
        """For as long as the context lasts; it begins when all names were asked for once, or a second has passed."""
        try:
            self.follow(self._sources)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EAGER):
                    for asked in [*self._asked.values()]:
                        await asked.wait()
            yield
        finally:
            watches = [*self._watches.values()]
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            if self._lookup is not None:
                await self._lookup.close()

    def follow(self, sources: Sequence[Source]) -> None:
        """These lead to all upstreams from now on. One that stays is the same, with what its source says of it now."""
        self._sources = sources
        names = {source.url for source in sources if source.url.startswith(BY_NAME)}
        for url in self._watches.keys() - names:
            self._watches.pop(url).cancel()
            for known in (self._asked, self._found, self._why, self._pool.astray):
                known.pop(url, None)
            self._many.discard(url)
        for url in names - self._watches.keys():
            if self._lookup is None:
                self._lookup = self._make_lookup()
            self._asked[url] = asyncio.Event()
            self._pool.astray[url] = "its addresses are not known yet"
            self._watches[url] = asyncio.create_task(self._watch(url, self._asked[url]))
        self._update()

    async def _watch(self, url: str, asked: asyncio.Event) -> None:
        while True:
            try:
                await self._ask(url)
            except Exception:
                # A bug of ours, which must not be the end of all lookups.
                _log.exception("the addresses of %s could not be asked for", url)
            asked.set()
            await asyncio.sleep(self._interval)

    async def _ask(self, url: str) -> None:
        """Ask once; the last answer stays where there is none, or an empty one."""
        host = urlsplit(url).hostname or ""
        try:
            async with asyncio.timeout(_PATIENCE):
                # Of both a server with both would be two. Whoever has A records has them for all, also where just now
                # they cannot be asked for.
                found, why, has_none = await self._addresses(host, socket.AF_INET)
                if not found and (has_none or not self._found.get(url)):
                    found, *_ = await self._addresses(host, socket.AF_INET6)
        except TimeoutError:
            found, why = [], f"no answer within {_PATIENCE:g} s"
        if not found:
            if why != self._why.get(url):
                kept = "; its last addresses are kept" if self._found.get(url) else ""
                _log.warning("%s leads to no upstream: %s%s", url, why, kept)
            self._why[url] = why
            if not self._found.get(url):
                self._pool.astray[url] = f"its name leads to no address ({why})"
            return
        if self._why.pop(url, None) is not None:
            _log.info("%s leads to upstreams again", url)
        used = self._bounded(url, found)
        if used != self._found.get(url):
            self._found[url] = used
            self._update()

    def _bounded(self, url: str, found: list[str]) -> list[str]:
        """Those that are used; the log says once where there are very many."""
        self._pool.astray.pop(url, None)
        if len(found) > _MOST:
            self._pool.astray[url] = f"it leads to {len(found)} addresses, of which {_MOST} are used"
        if len(found) <= _MANY:
            self._many.discard(url)
        elif url not in self._many:
            self._many.add(url)
            _log.warning(
                "%s leads to %d addresses, of which %d at most are upstreams, and each is probed but rarely: "
                "see that the name is that of your model servers alone",
                url,
                len(found),
                _MOST,
            )
        return found[:_MOST]

    async def _addresses(self, host: str, family: int) -> tuple[list[str], str, bool]:
        """In an order of their own, as an answer's changes; or why there are none, and whether that is certain."""
        assert self._lookup is not None
        try:
            found = set(await self._lookup.find(host, family))
        except OSError as error:
            return [], str(error), False
        except Exception as error:
            return [], str(error.args[-1]).lower(), error.args[0] in _HAS_NONE
        ordered = sorted(found, key=lambda address: ipaddress.ip_address(address.partition("%")[0]).packed)
        return ordered, "no address", True

    def _update(self) -> None:
        """The pool's upstreams are those that are known now; an address that two sources lead to is one."""
        before = self._known | {one.url: one for one in self._pool.leaving}
        wanted: dict[str, Upstream] = {}
        doubted = []
        for source in self._sources:
            plain = source.url.removeprefix(BY_NAME)
            for at in [None] if plain == source.url else self._found.get(source.url, []):
                made = Upstream.from_url(plain, at=at)
                if made.url in wanted or source.drains:
                    continue
                upstream = wanted[made.url] = before.get(made.url, made)
                if upstream.trust is not source.trust:
                    doubted.append(upstream)
                self._describe(upstream, source)
        came = [upstream for url, upstream in wanted.items() if url not in self._known]
        gone = [upstream for url, upstream in self._known.items() if url not in wanted]
        self._known = wanted
        for upstream in gone:
            upstream.gone = True
        self._pool.replace(tuple(wanted.values()))
        if came or gone or doubted:
            self._changed(came, gone, doubted)

    def _describe(self, upstream: Upstream, source: Source) -> None:
        upstream.gone = False
        upstream.source = source.named_by if source.named_by and source.url == upstream.url else source.url
        upstream.weight, upstream.authorization, upstream.trust = source.weight, source.authorization, source.trust
        if upstream.only != source.models:
            upstream.only = source.models
            self._pool.set_models(upstream, upstream.listed)

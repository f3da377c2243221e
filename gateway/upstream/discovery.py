"""DNS discovery of upstreams: each address of a name is one, as with a headless Service or Compose's replicas."""

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

# The prefix of a URL of whose host each address is an upstream.
BY_NAME = "dns+"
# The timeout of a lookup, and how long a start waits for the first lookup of all names, in seconds.
_PATIENCE = 5.0
_EAGER = 1.0
# A name with more addresses than the first number is logged, because each of so many upstreams is probed rarely. The
# addresses past the second number are not used: nobody has so many, and each costs memory, a connection and metrics.
_MANY, _MOST = 256, 1024
# The c-ares codes for a name without an address of a family (ENODATA, ENOTFOUND), as opposed to a failed lookup.
_HAS_NONE = (1, 4)


@dataclass(frozen=True, slots=True)
class Source:
    """The URL of an upstream, or of one at each address if it begins with `dns+`, and how to call it.

    `named_by` says where the source is configured: a setting or a file. `weight` is its share of calls relative to
    others. `models` are the models it may be asked for, None for all. `authorization` is sent to it, and `trust` says
    which certificates to accept: None for the common ones. `drains`: it gets no new calls.
    """

    url: str
    named_by: str = ""
    weight: float = 1.0
    models: frozenset[str] | None = None
    authorization: str | None = field(default=None, repr=False)
    trust: object | None = field(default=None, repr=False)
    drains: bool = False


class Discovery:
    """Keeps the pool's upstreams in step with the sources, one upstream per address.

    `changed` is called with three lists: new upstreams, removed upstreams, and upstreams with another `trust`. A
    removed upstream finishes its running calls and gets no new ones.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        pool: UpstreamPool,
        lookup: Callable[[], Lookup],
        interval: float,
        changed: Callable[[list[Upstream], list[Upstream], list[Upstream]], None],
    ) -> None:
        """`lookup` creates the resolver at the first name; names are resolved every `interval` seconds."""
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
        """Resolve names within the context; it begins after the first lookup of all names, or after one second."""
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
        """Use these sources from now on. A remaining upstream keeps its object and gets its source's new values."""
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
                # A bug in the gateway, which must not end all lookups.
                _log.exception("the addresses of %s could not be asked for", url)
            asked.set()
            await asyncio.sleep(self._interval)

    async def _ask(self, url: str) -> None:
        """Look a name up once; keep the last addresses if the lookup fails or finds none."""
        host = urlsplit(url).hostname or ""
        try:
            async with asyncio.timeout(_PATIENCE):
                # One family only: a server with both kinds of address would count twice. A name with A records has
                # them for all servers, even if they cannot be looked up just now.
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
        """The addresses that are used; a very large number is logged once."""
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
        """The sorted addresses, as DNS answers vary in order; or why there are none, and whether that is certain."""
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
        """Update the pool to the known addresses; an address of two sources is one upstream."""
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

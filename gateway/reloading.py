"""Reloads the files that the settings name, at SIGHUP and after a change; an invalid file changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gateway.admission.keys import Keys
from gateway.config.environment import SettingsError
from gateway.config.keys_file import reread_client_keys
from gateway.config.secrets import Secrets, token_client
from gateway.config.settings import Settings
from gateway.config.tls import ends_at, load_certificate, own_tls, upstream_tls
from gateway.config.upstreams_file import Upstreams, read_upstreams
from gateway.pool.aliases import Alias
from gateway.upstream.connections import ConnectionPool
from gateway.upstream.credentials import ClientCredentials, FixedKey
from gateway.upstream.discovery import Discovery

_log = logging.getLogger(__name__)

# Seconds between two checks of the files; a changed file is read once two checks found it the same.
_EVERY = 2.0

# Device, inode, link count, size and modification time of the file at a path; None if there is no file. A file that is
# mounted by itself has a link count of zero after another file has replaced it.
_Seen = tuple[int, int, int, int, int] | None


class WatchedFiles:
    """Some files, each with its state at the last check. A check may take long if a disk or a network hangs.

    The files are polled: mounted files, and links swapped as Kubernetes does it, send no events to watchers of the file
    or its folder.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._read = self._seen = _look(files)

    def look(self, files: Iterable[Path]) -> bool:
        """Whether the files differ from their state at the last `read`, and were the same in the check before."""
        before, self._seen = self._seen, _look(files)
        return self._seen == before and self._seen != self._read

    def read(self) -> None:
        """Mark the files as read in the state of the last check."""
        self._read = self._seen


def _look(files: Iterable[Path]) -> dict[Path, _Seen]:
    return {file: _seen(file) for file in files}


def _seen(file: Path) -> _Seen:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_nlink, found.st_size, found.st_mtime_ns


@dataclass(slots=True)
class _Watched:
    """Files that are reloaded together: a text for the log, their paths and their reader.

    `read` raises SettingsError. `fault` is the error of the last read, if any.
    """

    what: str
    files: Callable[[], list[Path]]
    read: Callable[[], Awaitable[str]]
    fault: str = ""
    seen: WatchedFiles = field(init=False)

    def __post_init__(self) -> None:
        self.seen = WatchedFiles(self.files())


class Reloading:
    """Applies the files: client keys, own certificate, upstreams with their keys and certificates, and aliases."""

    def __init__(
        self,
        settings: Settings,
        secrets: Secrets,
        *,
        keys: Keys | None,
        discovery: Discovery,
        aliases: dict[str, Alias],
        credentials: FixedKey | ClientCredentials,
        connections: ConnectionPool,
    ) -> None:
        self._settings = settings
        self._again = secrets.again
        self._own_tls = secrets.own_tls
        self._keys = keys
        self._discovery = discovery
        self._aliases = aliases
        self._credentials = credentials
        self._connections = connections
        self.certificate_ends_at = None if secrets.own_tls is None else ends_at(secrets.own_tls)
        self._upstream_files = secrets.upstreams.files
        self._use_aliases(secrets.upstreams)
        self._asked = asyncio.Event()
        certificate = [file for file in (settings.tls_cert_file, settings.tls_key_file) if file is not None]
        key_file = [] if settings.api_keys_file is None else [settings.api_keys_file]
        self._watched = [
            _Watched("the certificate stays as it is", lambda: certificate, self._read_certificate),
            _Watched("the keys stay as they are", lambda: key_file, self._read_keys),
            _Watched("what upstreams are shown stays as it is", lambda: secrets.files, self._read_credentials),
            _Watched("the upstreams stay as they are", lambda: self._upstream_files, self._read_upstreams),
        ]
        self._watched = [one for one in self._watched if one.files()]

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch the files within the context."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def reread(self) -> None:
        """Read all files soon, even if they have not changed."""
        self._asked.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY if self._watched else None):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            if asked and not self._watched:
                _log.info("there is no file to read again")
            for one in self._watched:
                try:
                    await self._read_if_changed(one, asked=asked)
                except Exception:
                    # A bug in the gateway, which must not end the watching.
                    _log.exception("the files were not read again")

    async def _read_if_changed(self, one: _Watched, *, asked: bool) -> None:
        # In a thread, because a hanging disk must not delay calls.
        changed = await asyncio.to_thread(one.seen.look, one.files())
        # After an error read again each time: the cause may be a file named in these files and not watched yet.
        if not changed and not asked and not one.fault:
            return
        one.seen.read()
        before, one.fault = one.fault, ""
        try:
            said = await one.read()
        except SettingsError as error:
            one.fault = str(error)
            if asked or one.fault != before:
                _log.error("%s: %s", one.what, error)
        else:
            _log.info("%s", said)

    async def _read_certificate(self) -> str:
        assert self._own_tls is not None
        own_tls(self._settings)  # an invalid certificate must not spoil the context in use
        load_certificate(self._own_tls, self._settings)
        self.certificate_ends_at = ends = ends_at(self._own_tls)
        until = "" if ends is None else f", good until {datetime.fromtimestamp(ends, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return f"certificate read again{until}"

    async def _read_keys(self) -> str:
        found = await reread_client_keys(self._settings)
        assert self._keys is not None
        assert found is not None
        before = self._keys.names
        self._keys.replace(found)
        after = self._keys.names
        changes = {
            "new": after.keys() - before.keys(),
            "gone": before.keys() - after.keys(),
            "changed": {name for name in before.keys() & after.keys() if before[name] != after[name]},
        }
        told = [f"; {what}: {', '.join(sorted(names))}" for what, names in changes.items() if names]
        return f"keys read again: {len(found)}{''.join(told)}"

    async def _read_credentials(self) -> str:
        settings = await asyncio.to_thread(self._again)
        client = token_client(settings)
        trusted = await asyncio.to_thread(upstream_tls, settings, None if client is None else client.url)
        if isinstance(self._credentials, FixedKey):
            key = settings.upstream_api_key
            self._credentials.replace(None if key is None else key.get_secret_value())
        elif client is not None:
            self._credentials.replace(client)
        self._connections.trust(trusted)
        return "what upstreams are shown, and whom to trust, read again"

    async def _read_upstreams(self) -> str:
        found = await asyncio.to_thread(read_upstreams, self._settings)
        self._upstream_files = found.files
        self._use_aliases(found)
        self._discovery.follow(found.sources)
        return f"upstreams read again: {len(found.sources)}"

    def _use_aliases(self, upstreams: Upstreams) -> None:
        # In place, because the data path holds this dict; never empty in between.
        made = {name: Alias(name, weights) for name, weights in upstreams.aliases.items()}
        for name in self._aliases.keys() - made.keys():
            del self._aliases[name]
        self._aliases.update(made)

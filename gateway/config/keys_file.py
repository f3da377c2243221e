"""Reads the API keys of clients, at the start and again while their file may be being written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from gateway.admission.keys import BadKeys, Key, from_lines, from_secrets
from gateway.config.environment import SettingsError
from gateway.config.settings import Settings

# Seconds between two reads of a file, and seconds that a file without a final newline must stay unchanged.
_BETWEEN = 0.2
_STANDS_STILL = 2.0


class _Read(NamedTuple):
    size: int
    modified: int
    inode: int
    content: bytes


def client_keys(settings: Settings) -> dict[bytes, Key] | None:
    """The API keys of clients, by their hashes; None if no key is required.

    Raises SettingsError for a file that cannot be read or is wrong.
    """
    file = settings.api_keys_file
    return _keys(settings, None if file is None else _read(file).content)


async def reread_client_keys(
    settings: Settings, pause: Callable[[float], Awaitable[object]] = asyncio.sleep
) -> dict[bytes, Key] | None:
    """Read the keys again from a file that may be being written.

    A partly written line or file would remove keys or limits, so a file that changes between two reads is refused.
    A complete file that is shorter than before does remove the keys it lacks. `pause` waits for that many seconds.
    Raises SettingsError as `client_keys` does, and for a file that changes.
    """
    file = settings.api_keys_file
    if file is None:
        return _keys(settings, None)
    found = _read(file)
    await pause(_BETWEEN)
    same = _read(file) == found
    if same and not found.content.endswith(b"\n"):
        await pause(_STANDS_STILL - _BETWEEN)
        same = _read(file) == found
    if not same:
        raise SettingsError(
            f"GATEWAY_API_KEYS_FILE {str(file)!r} is being written: it is read again once that is done."
        )
    return _keys(settings, found.content)


def _read(file: Path) -> _Read:
    try:
        content, status = _content(file)
        if status.st_nlink == 0:  # a new file may have replaced it just now, so read once more
            content, status = _content(file)
    except OSError as error:
        raise SettingsError(
            f"GATEWAY_API_KEYS_FILE {str(file)!r} cannot be read ({error.strerror}): name a file that can."
        ) from None
    if status.st_nlink == 0:
        raise SettingsError(
            f"GATEWAY_API_KEYS_FILE {str(file)!r} has been replaced, and what is mounted here is still the old file: "
            "restart the container, or mount the folder in place of the file."
        )
    return _Read(status.st_size, status.st_mtime_ns, status.st_ino, content)


def _content(file: Path) -> tuple[bytes, os.stat_result]:
    with file.open("rb") as opened:
        return opened.read(), os.fstat(opened.fileno())


def _keys(settings: Settings, content: bytes | None) -> dict[bytes, Key] | None:
    if content is None and not settings.api_keys:
        return None
    found = from_secrets((secret.get_secret_value() for secret in settings.api_keys), settings.key_max_in_flight)
    if content is not None:
        try:
            found |= from_lines(content.decode(), settings.key_max_in_flight)
        except ValueError as error:
            why = error if isinstance(error, BadKeys) else "it is not UTF-8"
            raise SettingsError(f"GATEWAY_API_KEYS_FILE {str(settings.api_keys_file)!r} is wrong: {why}.") from None
    return found

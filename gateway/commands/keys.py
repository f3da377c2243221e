"""The commands `keys add`, `list` and `revoke`: they edit the file of API keys, which holds only hashes."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gateway.admission.keys import BadKeys, from_lines

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MODELS = re.compile(r"[^\s,#]+(,[^\s,#]+)*")
# Random bytes in a key, and shown letters of a hash: enough to tell two keys apart, and useless for anything else.
_CHANCE = 32
_SHOWN = 8
_PRIVATE = 0o600


class KeysError(Exception):
    """The file of keys was not read or not changed; the text is a sentence that says why."""


class Limits(NamedTuple):
    """The limits of a key: requests and tokens per minute, calls in flight and in the queue, models.

    None means no limit.
    """

    requests: int | None = None
    tokens: int | None = None
    in_flight: int | None = None
    waiting: int | None = None
    models: str | None = None

    def words(self) -> Iterator[str]:
        """The limits in the form of a line of the file. Raises KeysError."""
        if self.models is not None and not _MODELS.fullmatch(self.models):
            raise KeysError(f"--models must be names between commas, without blanks, but it is {self.models!r}.")
        if self.requests is not None:
            yield str(self.requests)
        given = {"tokens": self.tokens, "in-flight": self.in_flight, "waiting": self.waiting, "models": self.models}
        yield from (f"{name}={value}" for name, value in given.items() if value is not None)


def add(file: Path, name: str, limits: Limits) -> str:
    """Write a new key's hash into the file, which is created if missing; returns the key. Raises KeysError."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"A key's name is of 1 to 64 letters, digits and . _ -, but it is {name[:100]!r}.")
    words = [*limits.words()]
    key = secrets.token_hex(_CHANCE)
    with _changing(file) as (target, lines):
        if name in _names(lines):
            raise KeysError(f"{file} has a key {name} already: revoke it first, or take another name.")
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines.append(" ".join([name, hashlib.sha256(key.encode()).hexdigest(), *words]) + "\n")
        _replace(file, target, lines)
    return key


def revoke(file: Path, name: str) -> None:
    """Remove the line of a key from the file. Raises KeysError, also for an unknown name and for the last key."""
    with _changing(file) as (target, lines):
        names = _names(lines)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}."
            raise KeysError(f"{file} has no key {name[:100]!r}: {advice}")
        if len(names) == 1:
            raise KeysError(
                f"{name} is the only key of {file}, and a gateway takes no file without one, but goes on with what it "
                "had: add another key first, or end the gateway and remove the file."
            )
        _replace(file, target, [line for line in lines if _name_of(line) != name])


def listed(file: Path) -> Iterator[str]:
    """A table of the keys: names, limits, and the beginning of each hash. Raises KeysError."""
    lines = _read(file, file)
    _check(file, lines)
    rows = [["NAME", "SHA256", "REQUESTS", "TOKENS", "IN-FLIGHT", "WAITING", "MODELS"]]
    for words in (line.partition("#")[0].split() for line in lines if _name_of(line)):
        name, digest, *rest = words
        # In the file the limit of requests has no name.
        pairs = [word.partition("=") if "=" in word else ("requests", "=", word) for word in rest]
        given = {limit: value for limit, _, value in pairs}
        limits = [given.get(limit, "-") for limit in ("requests", "tokens", "in-flight", "waiting", "models")]
        rows.append([name, f"{digest[:_SHOWN].lower()}…", *limits])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[tuple[Path, list[str]]]:
    """The file behind any links, and its lines; its folder is locked, so no other command changes it meanwhile."""
    target = file.resolve()  # replace the link's target, so that the link stays
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"The folder of {file} cannot be opened ({error.strerror}): make it first.") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield target, _read(file, target) if target.exists() else []
    finally:
        os.close(folder)


def _read(file: Path, target: Path) -> list[str]:
    try:
        return target.read_bytes().decode().splitlines(keepends=True)
    except OSError as error:
        raise KeysError(f"{file} cannot be read ({error.strerror}): name a file of keys that can.") from None
    except UnicodeDecodeError:
        raise KeysError(f"{file} is not UTF-8: name a file of keys.") from None


def _replace(file: Path, target: Path, lines: list[str]) -> None:
    """Replace the file atomically by these lines, after a check that a gateway accepts them."""
    _check(file, lines)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "wb") as opened:
            _be_as(descriptor, target)
            opened.write("".join(lines).encode())
            opened.flush()
            os.fsync(descriptor)
        os.rename(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise KeysError(f"{file} cannot be written ({error.strerror}); it is as it was.") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _be_as(descriptor: int, target: Path) -> None:
    """Copy the mode and the owner of the replaced file; only its owner can read and write a new file."""
    if not target.exists():
        os.fchmod(descriptor, _PRIVATE)
        return
    before = target.stat()
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(file: Path, lines: list[str]) -> None:
    try:
        from_lines("".join(lines))
    except BadKeys as error:
        raise KeysError(f"{file} is wrong: {error}.") from None


def _names(lines: list[str]) -> list[str]:
    return [name for name in map(_name_of, lines) if name]


def _name_of(line: str) -> str:
    """The name of the key in a line; empty if the line has no key."""
    return (line.partition("#")[0].split() or [""])[0]

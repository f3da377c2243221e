"""Reads cases.txt, which says how: requests as bytes, and what is to come of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_ESCAPES = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
_ESCAPE = re.compile(rb"\\(?:([rnt0\\])|x([0-9a-f]{2})|\{(.+?)\*(\d+)\})")


@dataclass(frozen=True)
class Case:
    """What is sent, in so many writes, and what comes of it: statuses, and what goes upstream, with its body.

    The gateway `closed` the connection, or `waits` for the rest of a request.
    """

    name: str
    writes: tuple[bytes, ...]
    statuses: tuple[int, ...]
    closed: bool
    waits: bool
    upstream: tuple[bytes, ...]


def unescaped(text: bytes) -> bytes:
    """Bytes as they are written in the file."""

    def meant(found: re.Match[bytes]) -> bytes:
        letter, code, repeated, times = found.groups()
        if repeated is not None:
            return unescaped(repeated) * int(times)
        return bytes.fromhex(code.decode()) if code else _ESCAPES[letter]

    assert b"\\" not in re.sub(_ESCAPE, b"", text), text
    return _ESCAPE.sub(meant, text)


def _case(part: str) -> Case:
    name, *lines = [line for line in part.splitlines() if line and not line.startswith("# ")]
    sent = [b""]
    upstream = []
    words: list[str] = []
    for line in lines:
        if line == "...":
            sent.append(b"")
        elif line.startswith("=> "):
            words = line[3:].split()
        elif line.startswith(">> "):
            upstream.append(unescaped(line[3:].encode()))
        else:
            sent[-1] += unescaped(line.encode())
    assert words, f"{name}: what is to come of it is not said"
    statuses = tuple(int(word) for word in words if word.isdigit())
    assert set(words) <= {"closed", "waits", *map(str, statuses)}, name
    return Case(name, tuple(sent), statuses, "closed" in words, "waits" in words, tuple(upstream))


CASES = [
    _case(part)
    for part in re.split(r"^--- ", (Path(__file__).parent / "cases.txt").read_text(), flags=re.MULTILINE)[1:]
]

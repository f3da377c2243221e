"""The file of keys, read again: what may be half of one changes nothing, what is whole does."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.config.environment import SettingsError
from gateway.config.keys_file import reread_client_keys
from gateway.config.settings import Settings


def line(name: str, more: str = "") -> str:
    return f"{name} {hashlib.sha256(name.encode()).hexdigest()}{more}"


class Pauses:
    """What a writer does while the file is looked at: one step in each pause."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(round(seconds, 3))
        if self._steps:
            self._steps.pop(0)()


def reread(file: Path, pauses: Pauses) -> dict[str, int | None]:
    """The names that are found, and what each may make in a minute."""
    settings = Settings(GATEWAY_API_KEYS_FILE=file)
    found = asyncio.run(reread_client_keys(settings, pauses))
    assert found is not None
    return {key.name: key.a_minute for key in found.values()}


def test_a_whole_file_is_taken_after_a_second_look(tmp_path: Path) -> None:
    file, pauses = tmp_path / "keys", Pauses()
    file.write_text(f"{line('a', ' 600')}\n")
    assert reread(file, pauses) == {"a": 600}
    assert pauses.seconds == [0.2]


def test_a_last_line_without_an_end_is_taken_once_the_file_stands_still(tmp_path: Path) -> None:
    file, pauses = tmp_path / "keys", Pauses()
    file.write_text(f"{line('b')}\n{line('a', ' 6')}")
    assert reread(file, pauses) == {"b": None, "a": 6}
    assert sum(pauses.seconds) == 2


def test_a_file_that_is_being_written_is_not_taken(tmp_path: Path) -> None:
    file, whole = tmp_path / "keys", f"{line('a', ' 600')}\n{line('b')}\n"

    def grow() -> None:
        file.write_text(whole)

    def replace() -> None:  # the same in bytes, but another file
        (tmp_path / "new").write_text(file.read_text())
        (tmp_path / "new").rename(file)

    def rewrite() -> None:
        file.write_text(whole.replace("600", "601"))

    def nothing() -> None: ...

    half = whole[: whole.index("00")]  # of a rate of 600 a 6 is left
    for begins, steps in (
        (half, (grow,)),
        (half, (nothing, grow)),
        (f"{line('a')}\n", (grow,)),
        (whole, (replace,)),
        (whole, (rewrite,)),
        (whole, (file.unlink,)),
        (whole[:50], (nothing, nothing)),  # it stands still, and is no file of keys
        ("", (nothing,)),
    ):
        file.write_text(begins)
        with pytest.raises(SettingsError, match=r"is being written: it is read again|cannot be read|is wrong"):
            reread(file, Pauses(*steps))
    file.write_text(half)
    with pytest.raises(SettingsError, match=r"^GATEWAY_API_KEYS_FILE '.*' is being written: it is read again"):
        reread(file, Pauses(nothing, grow))


@pytest.mark.skipif(sys.platform != "linux", reason="an open file has a path in Linux's /proc alone")
def test_a_file_that_was_replaced_behind_its_mount_is_told(tmp_path: Path) -> None:
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text(f"{line('a')}\n{line('b')}\n")
    new.write_text(f"{line('a')}\n")
    # A mount of the file alone goes on showing what it was, as an open file does.
    with file.open() as mounted:
        path = Path(f"/proc/self/fd/{mounted.fileno()}")
        assert reread(path, Pauses()) == {"a": None, "b": None}
        new.rename(file)
        with pytest.raises(SettingsError, match=r"has been replaced, .* the old file: restart the container"):
            reread(path, Pauses())
    assert reread(file, Pauses()) == {"a": None}

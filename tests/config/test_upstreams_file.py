"""The file of upstreams: what a line may say, and what a wrong one is told."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from gateway.config.environment import SettingsError
from gateway.config.settings import Settings
from gateway.config.upstreams_file import Upstreams, read_upstreams
from gateway.upstream.discovery import Source
from tests.support.paths import AUTHORITY

LINES = """
# what serves
http://a:8000/v1   weight=2.5 models=m,org/n   # the larger one
https://b  key-file=b.key ca-file=authority.pem
dns+http://pods:8000 weight=3 drain

alias fast=m:9,org/n:1 slow=m
alias *=m
"""


def read(folder: Path, text: str | bytes, *more: str) -> Upstreams:
    file = folder / "upstreams"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    given = ",".join([*more, f"@{file}"])
    return read_upstreams(Settings(GATEWAY_UPSTREAMS=given, GATEWAY_MODEL_ALIASES="old=m,slow=x"))


def test_a_line_is_an_upstream_or_other_names(tmp_path: Path) -> None:
    (tmp_path / "b.key").write_text("sk-of-b\n")
    (tmp_path / "authority.pem").write_text(AUTHORITY.read_text())
    found = read(tmp_path, LINES, "http://first:1")
    named = f"@{tmp_path}/upstreams"
    first, a, b, pods = found.sources
    assert first == Source("http://first:1")
    assert a == Source("http://a:8000", named, 2.5, frozenset({"m", "org/n"}))
    assert (b.url, b.authorization, isinstance(b.trust, ssl.SSLContext)) == ("https://b", "Bearer sk-of-b", True)
    assert pods == Source("dns+http://pods:8000", named, 3, drains=True)
    assert found.aliases == {"old": {"m": 1}, "slow": {"m": 1}, "fast": {"m": 9, "org/n": 1}, "*": {"m": 1}}
    assert found.files == [tmp_path / name for name in ("upstreams", "b.key", "authority.pem")]
    assert "sk-of-b" not in repr(found)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it has no upstream"),
        ("# nothing\nalias a=b", "it has no upstream"),
        (b"http://\xff", "it is not UTF-8"),
        ("\nlocalhost:8000", "line 2: 'localhost:8000' is no URL of an upstream, which must be as URLs like http://"),
        ("http://me:secret@host", "line 1: its value is no URL of an upstream, which must be as URLs without a user"),
        ("http://a\nhttp://a/", "line 2: another line has this URL"),
        ("http://a wieght=2", "line 1: 'wieght=2' is unknown; a line is URL [weight=N] [models=A,B]"),
        ("http://a drain=yes", "line 1: 'drain=yes' is unknown"),
        ("http://a weight", "line 1: 'weight' is unknown"),
        ("http://a weight=2 weight=2", "line 1: weight must stand there once, with a value"),
        ("http://a models=", "line 1: models must stand there once, with a value"),
        ("http://a weight=0", "line 1: weight='0' must be a number above 0, up to 1000000"),
        ("http://a weight=nan", "line 1: weight='nan' must be a number above 0"),
        ("http://a weight=many", "line 1: weight='many' must be a number above 0"),
        ("http://a models=a,,b", "line 1: models='a,,b' must be names with commas between them"),
        ("http://a key-file=none", "line 1: '{}/none' cannot be read (No such file or directory)"),
        ("http://a key-file=upstreams", "line 1: key-file '{}/upstreams' must hold a key of printable ASCII"),
        ("https://a ca-file=none", "line 1: ca-file '{}/none' cannot be used (No such file or directory): name a file"),
        ("https://a ca-file=upstreams", "line 1: ca-file '{}/upstreams' cannot be used (it holds no certificate)"),
        ("http://a\nalias", "line 2: after alias it must be NAME=MODEL[:WEIGHT], a name's further models"),
        ("http://a\nalias a=b\nalias a=c", "line 3: another line has the alias 'a'"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_and_what_it_may_be(text: str | bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as told:
        read(tmp_path, text)
    begin = f"GATEWAY_UPSTREAMS '@{tmp_path}/upstreams' is wrong: {why.replace('{}', str(tmp_path))}"
    assert str(told.value).startswith(begin)
    assert "secret" not in str(told.value)


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "folder")
    for name, why in (("none", "No such file or directory"), ("folder", "Is a directory")):
        with pytest.raises(SettingsError, match=rf"is wrong: '.*/{name}' cannot be read \({why}\)\.$"):
            read_upstreams(Settings(GATEWAY_UPSTREAMS=f"@{tmp_path}/{name}"))

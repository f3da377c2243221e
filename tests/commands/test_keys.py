"""`keys add`, `list` and `revoke`: what becomes of the file, and what a gateway that runs makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from gateway.admission.keys import from_lines
from gateway.cli import main
from tests.commands.test_cli import address, serving
from tests.support.fake_vllm import FakeVllm


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Keys = Callable[..., Ended]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def keys(file: Path, capsys: pytest.CaptureFixture[str]) -> Keys:
    def keys(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["keys", arguments[0], "--file", str(file), *arguments[1:]], prog_name="vllm-gateway")
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return keys


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_a_key_is_shown_once_and_its_hash_is_written(keys: Keys, file: Path) -> None:
    limits = ["--requests", "600", "--tokens", "90000", "--in-flight", "8", "--waiting", "4", "--models", "a,b/c"]
    added = keys("add", "rag-pipeline", *limits)

    key = added.out.removesuffix("\n")
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert added.status == 0
    assert "shown this once" in added.err
    assert "within seconds" in added.err
    assert file.read_text() == (f"rag-pipeline {digest(key)} 600 tokens=90000 in-flight=8 waiting=4 models=a,b/c\n")
    assert file.stat().st_mode & 0o777 == 0o600
    (found,) = from_lines(file.read_text()).values()
    assert (found.name, found.a_minute, found.max_in_flight) == ("rag-pipeline", 600, 8)
    assert key not in added.err
    assert keys("add", "other").out != added.out


def test_all_else_of_the_file_stays_as_it_was(keys: Keys, file: Path) -> None:
    kept = [f"# ours\r\n\n  a {digest('a')} 600 # of the pipeline\n", f"b {digest('b')}"]
    file.write_bytes("".join(kept).encode())
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1000, 1001)
    before = file.stat()

    assert keys("add", "c", "--requests", "5").status == 0
    (written,) = re.findall(r"c [0-9a-f]{64} 5\n", file.read_text())
    assert file.read_bytes().decode() == f"{kept[0]}{kept[1]}\n{written}"
    assert keys("revoke", "b").status == 0
    assert file.read_bytes().decode() == f"{kept[0]}{written}"
    assert keys("revoke", "a").status == 0
    assert file.read_bytes().decode() == f"# ours\r\n\n{written}"
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert [*file.parent.iterdir()] == [file]


def test_a_link_stays_one(keys: Keys, file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file.symlink_to(tmp_path / "real" / "keys")

    assert keys("add", "a").status == 0
    assert file.is_symlink()
    assert len((tmp_path / "real" / "keys").read_text().splitlines()) == 1


def test_the_list_has_names_and_limits_and_no_hash(keys: Keys, file: Path) -> None:
    file.write_text(
        f"# ours\na {digest('a').upper()} 600 models=x,y tokens=9 # the pipeline's\nlonger-name {digest('b')}\n"
    )

    assert keys("list") == (
        0,
        "NAME         SHA256     REQUESTS  TOKENS  IN-FLIGHT  WAITING  MODELS\n"
        f"a            {digest('a')[:8]}…  600       9       -          -        x,y\n"
        f"longer-name  {digest('b')[:8]}…  -         -       -          -        -\n",
        "",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "a"], "has a key a already: revoke it first, or take another name."),
        (["add", "of mine"], "letters, digits and . _ -, but it is 'of mine'."),
        (["add", "c", "--models", "x, y"], "--models must be names between commas, without blanks, but it is 'x, y'."),
        (["revoke", "pipelin"], "has no key 'pipelin': did you mean pipeline?"),
        (["revoke", "zzz"], "has no key 'zzz': it has a, pipeline."),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_changes_nothing(
    keys: Keys, file: Path, arguments: list[str], says: str
) -> None:
    file.write_text(f"a {digest('a')}\npipeline {digest('b')}\n")
    before = file.read_text()
    ended = keys(*arguments)

    assert (ended.status, ended.out, file.read_text()) == (1, "", before)
    assert ended.err.startswith("vllm-gateway: ")
    assert ended.err.endswith(f"{says}\n")


def test_the_last_key_is_not_revoked_as_no_gateway_would_hear_of_it(keys: Keys, file: Path) -> None:
    file.write_text(f"a {digest('a')}\n")

    assert "a is the only key of" in keys("revoke", "a").err
    assert file.read_text() == f"a {digest('a')}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a no-hash\n", "is wrong: line 1 must be NAME SHA256"),
        (b"\xff\n", "is not UTF-8: name a file of keys."),
    ],
)
def test_a_file_that_no_gateway_takes_is_left(keys: Keys, file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    for command in (["add", "b"], ["list"]):
        ended = keys(*command)
        assert (ended.status, ended.out, file.read_bytes()) == (1, "", content)
        assert says in ended.err


def test_a_file_or_folder_that_is_not_there_is_told(keys: Keys, file: Path, tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in keys("list").err
    assert "has no key 'a': it has none." in keys("revoke", "a").err
    missing = tmp_path / "no" / "keys"
    ended = keys("add", "a", "--file", str(missing))  # the last of two counts
    assert (ended.status, ended.err) == (
        1,
        f"vllm-gateway: The folder of {missing} cannot be opened (No such file or directory): make it first.\n",
    )


def test_without_a_file_it_says_where_it_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", "list"], prog_name="vllm-gateway")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "vllm-gateway: Name the file of keys: by --file, or GATEWAY_API_KEYS_FILE.\n"

    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(file))
    with pytest.raises(SystemExit):
        main(["keys", "add", "a"], prog_name="vllm-gateway")
    assert file.read_text().startswith("a ")


def test_a_write_that_fails_leaves_the_file_and_nothing_beside_it(
    keys: Keys, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys("add", "a")
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ended = keys("add", "b")

    assert (ended.status, ended.out) == (1, "")
    assert "cannot be written (No space left on device); it is as it was." in ended.err
    assert file.read_bytes() == before
    assert [*file.parent.iterdir()] == [file]


def test_of_many_at_once_none_is_lost(file: Path) -> None:
    argv = [sys.executable, "-m", "gateway", "keys", "add", "--file", str(file)]
    started = [subprocess.Popen([*argv, f"k{number}"], stdout=subprocess.DEVNULL) for number in range(6)]
    assert [process.wait(60) for process in started] == [0] * 6
    assert sorted(key.name for key in from_lines(file.read_text()).values()) == [f"k{number}" for number in range(6)]


def test_a_gateway_that_runs_takes_and_refuses_them_after_a_hangup(keys: Keys, file: Path, fake: FakeVllm) -> None:
    first = keys("add", "first").out.strip()
    with serving("--upstream", fake.url, "--port", "0", GATEWAY_API_KEYS_FILE=str(file)) as process:
        url = address(process)

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code

        def hang_up() -> None:
            process.send_signal(signal.SIGHUP)
            assert process.stdout is not None
            for line in process.stdout:
                if "keys" in json.loads(line).get("message", ""):
                    return

        second = keys("add", "second").out.strip()
        before = (status(first), status(second))
        hang_up()
        added = (status(first), status(second))
        keys("revoke", "first")
        hang_up()
        revoked = (status(first), status(second))

    assert (before, added, revoked) == ((200, 401), (200, 200), (401, 200))

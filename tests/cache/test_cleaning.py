"""`clean`: what is listed and removed of the cache folder, and when nothing is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cache.running import Running, announced, folder_in
from gateway.cli import main

Clean = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vllm-gateway"


@pytest.fixture
def filled(cache: Path) -> Path:
    (cache / "env-1").mkdir(parents=True)
    (cache / "env-1" / "big").write_bytes(b"x" * 3_000_000)
    os.link(cache / "env-1" / "big", cache / "env-1" / "same")
    (cache / "demo-model-2").mkdir()
    (cache / "demo-model-2" / "weights").write_bytes(b"x" * 10_000)
    (cache / "install.lock").touch()
    (cache / "install.log").write_text("said\n")
    return cache


@pytest.fixture
def clean(capsys: pytest.CaptureFixture[str]) -> Clean:
    def clean(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["clean", *arguments], prog_name="vllm-gateway")
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capsys.readouterr())

    return clean


def test_what_is_kept_is_listed_and_stays_without_a_yes(clean: Clean, filled: Path) -> None:
    status, out, err = clean()
    assert status == 2
    rows = out.splitlines()
    assert rows[0].split() == ["3", "MB", "env-1", "vLLM", "for", "the", "CPU,", "installed", "by", "`up`"]
    assert rows[-1].endswith("3 MB  in all")
    assert "--yes" in err
    assert (filled / "env-1" / "big").exists()


def test_with_a_yes_all_of_it_is_removed(clean: Clean, filled: Path) -> None:
    status, out, _ = clean("--yes")
    assert status == 0
    assert f"{filled} is removed." in out
    assert not filled.exists()


def test_what_is_not_ours_stays(clean: Clean, filled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    (filled / "env-3").symlink_to(other)
    (filled / "notes.txt").write_text("mine")

    status, out, _ = clean("--yes")
    assert status == 0
    assert [*filled.iterdir()] == [filled / "notes.txt"]
    assert f"{filled} has nothing of the gateway any more." in out
    assert (other / "kept").exists()


def test_nothing_there_is_said(clean: Clean, cache: Path) -> None:
    assert clean("--yes")[:2] == (0, f"{cache} has nothing of the gateway.\n")


def test_nothing_is_removed_under_a_running_up(clean: Clean, filled: Path) -> None:
    running = Running(os.getpid(), "http://127.0.0.1:9000", "http://127.0.0.1:8008", "demo-model", "log")
    with announced(folder_in(filled), running):
        status, _, err = clean("--yes")
    assert status == 1
    assert f"`up` runs here as process {os.getpid()}, on http://127.0.0.1:9000: stop it first." in err
    assert (filled / "env-1" / "big").exists()


def test_nothing_is_removed_while_something_is_installed(clean: Clean, filled: Path) -> None:
    with (filled / "install.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = clean("--yes")
    assert status == 1
    assert "is installing" in err
    assert (filled / "env-1" / "big").exists()

"""Downloads that are killed, stopped or run twice: what is left, and what the next one fetches."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.conftest import FILES, NAME, contents, partials
from tests.support.paths import ROOT
from tests.support.whole_hub import WholeHub

WEIGHTS = "model.safetensors"
SIZE = 40_000_000
AGAIN = 10 * 1024 * 1024
"""What may be fetched again after a kill."""


@pytest.fixture(autouse=True)
def large(serving: WholeHub) -> bytes:
    data = random.Random(4).randbytes(SIZE)
    serving.models[NAME] = FILES | {WEIGHTS: data}
    return data


@contextlib.contextmanager
def started(hub: WholeHub, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`download` in a process of its own, with the cache in `folder`."""
    environ = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "download", NAME, *options],
        env=environ,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(hub: WholeHub, folder: Path, *options: str) -> str:
    with started(hub, folder, *options) as process:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip()


def eventually(true: object, what: str = "") -> None:
    assert callable(true)
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def held_at(hub: WholeHub, folder: Path, size: int) -> None:
    """Wait until so much of the weights is on the disk, of which the hub sends no more for now."""
    assert hub.held.wait(60)
    eventually(lambda: any(partial.stat().st_size == size for partial in partials(folder)), "it is not all written")


@pytest.mark.parametrize("options", [(), ("--local-dir", "folder"), ("--save-as-tarfile",)], ids=str)
def test_after_a_kill_only_what_is_missing_is_fetched(
    serving: WholeHub, tmp_path: Path, options: tuple[str, ...], large: bytes
) -> None:
    come = SIZE * 3 // 4
    serving.holds[WEIGHTS] = come
    with started(serving, tmp_path, *options) as process:
        held_at(serving, tmp_path, come)
        process.kill()
    # Whatever it is that looks for a model finds none.
    assert not list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("*.tar*"))
    serving.holds.clear()
    serving.go_on.set()
    before, serving.asked[:] = serving.sent, []
    where = tmp_path / finished(serving, tmp_path, *options)
    assert serving.sent - before <= SIZE - come + AGAIN
    assert (WEIGHTS, f"bytes={come}-") in serving.files_asked()
    if options != ("--save-as-tarfile",):
        assert contents(where) == serving.models[NAME]


def test_kills_at_any_moment_lose_nothing(serving: WholeHub, tmp_path: Path) -> None:
    moments = random.Random(5)
    for _ in range(4):
        serving.held.clear()
        serving.holds[WEIGHTS] = moments.randrange(SIZE)
        with started(serving, tmp_path) as process:
            # At the hold, or a little before: what the hub has sent is on its way.
            eventually(lambda: partials(tmp_path) or serving.held.is_set())
            process.kill()
        assert not list(tmp_path.rglob("config.json"))
    serving.holds.clear()
    serving.go_on.set()
    there = sum(blob.stat().st_size for blob in tmp_path.glob("cache/*/blobs/*"))
    before = serving.sent
    where = Path(finished(serving, tmp_path))
    assert contents(where) == serving.models[NAME]
    assert serving.sent - before <= sum(map(len, serving.models[NAME].values())) - there + AGAIN


@pytest.mark.parametrize("options", [(), ("--local-dir", "folder"), ("--save-as-tarfile", "--gzip")], ids=str)
@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_ctrl_c_leaves_nothing_that_looks_whole(
    serving: WholeHub, tmp_path: Path, options: tuple[str, ...], path: str
) -> None:
    serving.holds[path] = len(serving.models[NAME][path]) // 2
    with started(serving, tmp_path, *options) as process:
        assert serving.held.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert err.endswith("vllm-gateway: Stopped. What has come is kept, and the same command goes on from there.\n")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("*.tar*"))


def test_two_at_once_fetch_each_file_once(serving: WholeHub, tmp_path: Path) -> None:
    serving.holds[WEIGHTS] = SIZE // 2
    with started(serving, tmp_path) as first:
        assert serving.held.wait(60)
        with started(serving, tmp_path) as second:
            # The second has come as far as it can.
            eventually(lambda: len([path for path, _ in serving.asked if "/tree/" in path]) == 2)
            serving.holds.clear()
            serving.go_on.set()
            for process in (first, second):
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
                assert contents(Path(out.strip())) == serving.models[NAME]
    assert [path for path, _ in serving.files_asked()].count(WEIGHTS) == 1

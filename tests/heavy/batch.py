"""The command `batch` where it takes minutes, a real vLLM that dies, or a disk that fills: needs root.

Not among the tests that `make test` finds; `make test-batch` runs it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from gateway.modelserver.vllm_process import DEMO_NAME
from tests.commands.test_batch import CHAT, PEAK, results, sending_to, statuses, written
from tests.heavy.restarts import Vllm, wait_for_health
from tests.support.fake_vllm import FakeVllm
from tests.support.load import gateway


def line(custom_id: str, **fields: object) -> bytes:
    body = {"model": DEMO_NAME, "messages": [{"role": "user", "content": "What is vLLM?"}], **fields}
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def wait_for_lines(path: str, count: int) -> None:
    until = time.monotonic() + 120
    while not Path(path).exists() or Path(path).read_bytes().count(b"\n") < count:
        assert time.monotonic() < until, f"{path} never has {count} lines"
        time.sleep(0.05)


def test_a_vllm_that_is_killed_and_comes_back_costs_no_line(tmp_path: Path) -> None:
    vllm = Vllm(tmp_path)
    names = [f"{number:03}" for number in range(150)]
    source, out = (
        written(tmp_path / "in", *(line(name, max_tokens=40, ignore_eos=True) for name in names)),
        tmp_path / "out",
    )
    with gateway([vllm.url]) as (_, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        url = f"http://127.0.0.1:{port}"
        with vllm.running():
            wait_for_health(client, 200)
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "batch", source, "-o", out, "--url", url, "--max-concurrency", "4"],
                stderr=subprocess.PIPE,
            )
            wait_for_lines(str(out), 50)
            vllm.kill("api_server")
        assert process.poll() is None
        with vllm.running():
            _, err = process.communicate(timeout=300)

    assert process.returncode == 0, err
    assert statuses(str(out)) == dict.fromkeys(names, 200)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_costs_no_line(fake: FakeVllm, tmp_path: Path, small_disk: Path) -> None:
    names = [f"{number:04}" for number in range(4000)]
    source = written(tmp_path / "in", *map(line, names))
    out = small_disk / "out"
    with sending_to(fake.url, source, "-o", str(out)) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"takes no more results (No space left on device): make room. Run the same again to go on." in err
    before = results(out.read_bytes())
    assert 500 < len(before) < 4000

    # No room for what has to be written anew is told, and nothing is lost by it.
    failure = b'{"id":"batch_req_1","custom_id":"0001","response":null,"error":{}}\n'
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([failure, *kept[1:]]))
    with sending_to(fake.url, source, "-o", str(out)) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert b"cannot be gone on with (No space left on device)" in err
    assert out.read_bytes() == b"".join([failure, *kept[1:]])
    assert [file.name for file in small_disk.iterdir()] == ["out"]

    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    with sending_to(fake.url, source, "-o", str(out)) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert statuses(str(out)) == dict.fromkeys(names, 200)


def test_fifty_thousand_lines_take_less_than_150_mb(fake: FakeVllm, tmp_path: Path) -> None:
    names = [f"request-{number}" for number in range(50_000)]
    source = written(tmp_path / "in", *(line(name, user="x" * 1000) for name in names))
    out = tmp_path / "out"
    with gateway([fake.url]) as (_, port):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "batch", source, "-o", out, "--url", f"http://127.0.0.1:{port}"],
            capture_output=True,
            check=False,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.splitlines()[-1]) / 1024 < 150
    with out.open("rb") as file:
        found = [orjson.loads(one)["custom_id"] for one in file]
    assert sorted(found) == sorted(names)

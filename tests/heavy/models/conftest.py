"""Two real servers of S3 on loopback, and the demo model as a hub has it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest

from bench.arms import environment
from gateway.modelserver.demo_model import ensure_demo_model
from tests.support import whole_hub
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.whole_hub import WholeHub

LOCK = Path(__file__).parent / "servers.lock"
NAME = "demo/tiny-llama"
KEYS = {"AWS_ACCESS_KEY_ID": "accesskey", "AWS_SECRET_ACCESS_KEY": "secretsecret", "AWS_REGION": "us-east-1"}


class Server(NamedTuple):
    """A server of S3 with the bucket `models`; `files` is where one that has a folder for it keeps them."""

    url: str
    files: Path | None

    def environ(self) -> dict[str, str]:
        """What a client of it needs, and nothing of this machine's own."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {**clean, **KEYS, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}

    def run(self, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """`vllm-gateway` with these arguments."""
        return gateway(ROOT, *arguments, **{**self.environ(), **environ})


def gateway(folder: Path, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`vllm-gateway` with these arguments, run in a folder."""
    command = [sys.executable, "-m", "gateway", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=120, check=False)


@contextlib.contextmanager
def _started(command: list[str | Path], port: int, log: Path) -> Iterator[str]:
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keeps objects as files, and knows no conditions."""
    folder, port = tmp_path_factory.mktemp("rclone"), free_port()
    (folder / "root" / "models").mkdir(parents=True)
    program = environment("model-servers", LOCK, sys.executable) / "rclone"
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    command: list[str | Path] = [program, "serve", "s3", "--auth-key", keys, "--addr", f"127.0.0.1:{port}"]
    command += ["--config", folder / "none", folder / "root"]
    with _started(command, port, folder / "log") as url:
        yield Server(url, folder / "root" / "models")


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keeps objects in memory, and refuses to write over one where the condition says so."""
    port = free_port()
    python = environment("model-servers", LOCK, sys.executable) / "python"
    command: list[str | Path] = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _started(command, port, tmp_path_factory.mktemp("moto") / "log") as url:
        keys = {"aws_access_key_id": "accesskey", "aws_secret_access_key": "secretsecret"}
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="models")
        yield Server(url, None)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model, which is built if there is none."""
    return ensure_demo_model(os.environ)


@pytest.fixture(scope="session")
def hub(demo: Path) -> Iterator[WholeHub]:
    """A hub that has the demo model."""
    with whole_hub.serving() as serving:
        serving.models[NAME] = {
            path.name: path.read_bytes() for path in demo.iterdir() if path.name != "demo-model.json"
        }
        yield serving

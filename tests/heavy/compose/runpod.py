"""vLLM and the gateway in one container, as Runpod's load balancing endpoints start, ask and end it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.heavy.compose.running import eventually, run
from tests.support.paths import ROOT
from tests.support.ports import free_port

IMAGE = "vllm-gateway-runpod"
CPU = "vllm/vllm-openai-cpu:v0.32.0-x86_64"
# What a CPU needs beside what Runpod gives; there a GPU does without.
OURS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DTYPE": "float32"}
MAX_TOKENS = 600


class Worker:
    """A worker's container, with the demo model on its volume and vllm-app's settings."""

    def __init__(self, volume: Path) -> None:
        self.port, self.health_port = free_port(), free_port()
        given = {
            "PORT": "8080",
            "PORT_HEALTH": "8081",
            "VLLM_APP_CONFIG": "/runpod-volume/config.json",
            "VLLM_EAGER": "1",
            "MAX_TOKENS": "4096",
            "SERVED_MODEL_NAME": "demo-model",
            "HF_HUB_OFFLINE": "1",
            **OURS,
        }
        options = [f"--publish=127.0.0.1:{self.port}:8080", f"--publish=127.0.0.1:{self.health_port}:8081"]
        options += [f"--volume={volume}:/runpod-volume", "--shm-size=4g", "--cap-add=SYS_NICE"]
        options += [f"--env={name}={value}" for name, value in given.items()]
        self.name = run("docker", "run", "--detach", *options, IMAGE).strip()

    def ping(self) -> int | None:
        """What Runpod's load balancer is told; None while nobody listens."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.health_port}/ping", trust_env=False, timeout=5).status_code
        except httpx.HTTPError:
            return None

    def log(self) -> str:
        """All that it said."""
        done = subprocess.run(["docker", "logs", self.name], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def image() -> str:
    """Built from the stand-in of vLLM for the CPU."""
    run(
        "docker", "build", "--file", "docker/runpod/Dockerfile", "--build-arg", f"VLLM_IMAGE={CPU}", "--tag", IMAGE, "."
    )
    return IMAGE


@pytest.fixture
def worker(image: str, tmp_path: Path) -> Iterator[Worker]:
    """One that has just been started."""
    run(str(ROOT / ".venv/bin/vllm-gateway"), "demo-model", str(tmp_path / "models/demo"))
    config = {"model_path": "./models/demo", "max_tokens": MAX_TOKENS, "temperature": 0.01}
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = Worker(tmp_path)
    try:
        yield started
    finally:
        run("docker", "rm", "--force", started.name)


def test_a_worker_loads_serves_and_lets_its_answers_end(worker: Worker) -> None:
    told: list[int] = []

    def is_healthy() -> bool:
        status = worker.ping()
        if status is not None and status not in told:
            told.append(status)
        return status == httpx.codes.OK

    try:
        eventually(is_healthy, 400)
    finally:
        sys.stdout.write(worker.log())  # shown with a failure
    assert told == [httpx.codes.NO_CONTENT, httpx.codes.OK]
    with httpx.Client(base_url=f"http://127.0.0.1:{worker.port}", trust_env=False, timeout=60) as client:
        answer = client.post(
            "/v1/chat/completions", json={"messages": {"user": "What is Deep Learning?"}, "streaming": False}
        )
        assert answer.json()["text"].startswith("Deep learning is a branch of machine learning")
        # It asks for more than config.json's max_tokens lets a call have, and gets all of those while the worker ends.
        call = {
            "model": "demo-model",
            "messages": [{"role": "user", "content": "Who are you?"}],
            "max_tokens": 3000,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with client.stream("POST", "/v1/chat/completions", json=call) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            stopping = subprocess.Popen(["docker", "stop", "-t", "60", worker.name], stdout=subprocess.DEVNULL)
            *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == MAX_TOKENS
    assert done == "data: [DONE]"
    assert stopping.wait(60) == 0
    assert json.loads(run("docker", "inspect", worker.name))[0]["State"]["ExitCode"] == 0
    # vLLM is for this container alone.
    assert "Starting: vllm serve /runpod-volume/models/demo --host 127.0.0.1 --port 8008" in worker.log()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME, "),
        ({"LLM_VLLM_MODEL_NAME": "Org/Name", "PORT": "8008"}, "PORT must be another port than 8008, which is vLLM's"),
        ({"LLM_VLLM_MODEL_NAME": "Org/Name", "VLLM_NNODES": "2"}, "VLLM_NNODES is 2, but VLLM_MASTER_ADDR is not set"),
    ],
)
def test_a_worker_says_why_it_cannot_start(image: str, given: dict[str, str], told: str) -> None:
    command = ["docker", "run", "--rm", *(f"--env={name}={value}" for name, value in given.items()), image]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllm-gateway: {told}")

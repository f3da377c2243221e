"""The command, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.cli import _hide_what_cannot_run, main
from gateway.observability.own_version import own_build
from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk
from tests.support.ports import free_port


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    """Where it says that it listens; it waits for that line."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)["message"]
        if said.startswith("listening on "):
            return str(said.split()[2].rstrip(","))
    raise AssertionError("it ended without listening")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_ends_on_a_signal(fake: FakeVllm, number: signal.Signals) -> None:
    with serving("--upstream", fake.url, "--port", "0") as process:
        url = address(process)
        got = httpx.post(f"{url}/v1/chat/completions", json={"messages": "Hi", "streaming": False}, trust_env=False)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)

    assert got.json()["text"] == "It's."
    assert process.returncode == 0
    assert [json.loads(line)["outcome"] for line in out.splitlines() if "outcome" in line] == ["done"]
    assert err == ""


def test_a_running_stream_ends_before_sigterm_does(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([STREAM_HEAD, chunk(EVENTS[0]), hold, chunk(DONE), STREAM_END])
    with serving("--upstream", fake.url, "--port", "0") as process:
        url = address(process)
        call = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        with (
            httpx.Client(trust_env=False) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=call) as got,
        ):
            pieces = got.iter_raw()
            first = next(pieces)
            process.send_signal(signal.SIGTERM)
            hold.release()
            rest = b"".join(pieces)
        process.communicate(timeout=10)

    assert (first, rest) == (EVENTS[0], DONE)


def wait_until(process: subprocess.Popen[str], action: str, number: signal.Signals) -> None:
    """Until it ignores (SigIgn) or catches (SigCgt) a signal: proc(5)."""
    until = time.monotonic() + 20
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.partition(f"{action}:")[2].split()[0], 16) >> (number - 1) & 1:
            return
        assert time.monotonic() < until, status
        time.sleep(0.001)


linux = pytest.mark.skipif(sys.platform != "linux", reason="what a process does with signals stands in Linux's /proc")


@linux
def test_a_hangup_before_it_can_be_served_is_ignored(fake: FakeVllm) -> None:
    with serving("--upstream", fake.url, "--port", "0") as process:
        wait_until(process, "SigIgn", signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        wait_until(process, "SigCgt", signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        url = address(process)
        assert process.stdout is not None
        assert any("there is no file to read again" in line for line in process.stdout)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)

    assert (process.returncode, err) == (0, "")


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_ends_it_in_good_order(fake: FakeVllm, number: signal.Signals) -> None:
    with serving("--upstream", fake.url, "--port", "0") as process:
        wait_until(process, "SigIgn", signal.SIGHUP)
        wait_until(process, "SigCgt", number)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)

    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_however_many_signals_come_its_exit_status_is_its_own(fake: FakeVllm, number: signal.Signals) -> None:
    with serving("--upstream", fake.url, "--port", "0") as process:
        address(process)
        while process.poll() is None:
            process.send_signal(number)
        _, err = process.communicate(timeout=10)

    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize(("host", "shown"), [("::1", "http://[::1]:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_address_that_it_tells_of_is_a_url(fake: FakeVllm, host: str, shown: str) -> None:
    with serving("--upstream", fake.url, "--port", "0", "--host", host) as process:
        url = address(process)
        assert url.startswith(shown)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_a_second_port_for_probes_answers_too(fake: FakeVllm) -> None:
    with serving("--upstream", fake.url, "--port", "0", PORT_HEALTH=str(free_port())) as process:
        urls = [address(process), address(process)]
        assert [httpx.get(f"{url}/health", trust_env=False).status_code for url in urls] == [200, 200]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)

    assert process.returncode == 0


def test_logs_for_people_are_text(fake: FakeVllm) -> None:
    with serving("--upstream", fake.url, "--port", "0", GATEWAY_LOG_FORMAT="text") as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()

    assert re.search(r" INFO    vllm-gateway \S+ begins, (compiled|in plain Python)\n", first)
    assert (", compiled" in first) == (own_build() == "compiled")
    assert " INFO    listening on http://127.0.0.1:" in second


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--port", "99999"], {}, "GATEWAY_PORT is wrong: '99999'. Allowed: less than or equal to 65535."),
        (["--upstream", "ftp://x"], {}, "GATEWAY_UPSTREAMS is wrong: 'ftp://x'"),
        ([], {"GATEWAY_PROT": "1"}, "GATEWAY_PROT is not a setting of the gateway: did you mean GATEWAY_PORT?"),
        (["--env-file", "/nope"], {}, "The file of settings '/nope' cannot be read"),
        (["--host", "192.0.2.1"], {}, "Cannot listen on 192.0.2.1 port 9000"),
        (["--host", "no.such.invalid"], {}, "Cannot listen on no.such.invalid port 9000"),
    ],
)
def test_a_wrong_start_ends_with_a_sentence(arguments: list[str], environment: dict[str, str], says: str) -> None:
    ended = command("serve", *arguments, **environment)

    assert ended.returncode == 2
    assert f"vllm-gateway: {says}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("setting", ["GATEWAY_PORT", "GATEWAY_HEALTH_PORT"])
def test_a_port_in_use_is_named(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = command("serve", "--host", "127.0.0.1", **{"GATEWAY_PORT": "0", setting: port})

    assert ended.returncode == 2
    assert f"Cannot listen on 127.0.0.1 port {port} (Address already in use)" in ended.stderr
    assert f"GATEWAY_HOST and {setting} " in ended.stderr


def test_check_of_anything_else_fails_and_says_why() -> None:
    unreachable = command("check", "--upstream", "http://127.0.0.1:9", GATEWAY_PORT="1", LLM_USVC_PORT="2")
    wrong = command("check", GATEWAY_LOG_FORMAT="xml")

    assert unreachable.returncode == 1
    assert "http://127.0.0.1:9 is loading: it refuses connections" in unreachable.stdout
    assert (
        "warning: GATEWAY_PORT and LLM_USVC_PORT are both set and differ: GATEWAY_PORT is used." in unreachable.stdout
    )
    assert wrong.returncode == 1
    assert "GATEWAY_LOG_FORMAT is wrong: 'xml'. Allowed: 'json' or 'text'." in wrong.stderr


def test_up_tells_of_a_name_that_does_not_count() -> None:
    ports = {"GATEWAY_PORT": str(free_port()), "LLM_VLLM_PORT": str(free_port())}
    model = {"LLM_VLLM_MODEL_NAME": "none", "LLM_VLLM_PYTHON": sys.executable}
    ended = command("up", **ports, **model, VLLM_MAX_MODEL_LEN="2048", MAX_TOKENS="1024")

    assert ended.returncode == 1
    warning, problem = ended.stderr.splitlines()
    assert warning == (
        "vllm-gateway: warning: VLLM_MAX_MODEL_LEN and MAX_TOKENS are both set and differ: VLLM_MAX_MODEL_LEN is used."
    )
    assert "Unknown model 'none'" in problem


def test_help_leads_to_every_setting() -> None:
    assert "vllm-gateway settings" in command("serve", "--help").stdout
    listed = command("settings").stdout
    assert "GATEWAY_UPSTREAMS, LLM_MODEL_SERVER_ENDPOINT = http://localhost:8008" in listed


@pytest.mark.parametrize(("is_linux", "has_locks"), [(True, False), (False, True)])
def test_what_installs_a_model_server_is_no_command_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_linux: bool, has_locks: bool
) -> None:
    monkeypatch.setattr(main, "commands", {**main.commands})
    assert {"up", "quantize", "demo-model", "serve"} <= main.commands.keys()
    _hide_what_cannot_run(is_linux, tmp_path if has_locks else tmp_path / "none")
    assert not {"up", "quantize", "demo-model"} & main.commands.keys()
    assert {"serve", "chat", "check", "plan", "batch"} <= main.commands.keys()

"""`up`: both processes are started, told of, watched and ended together, with a stand-in for vLLM."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.commands import up
from gateway.config.settings import Settings
from tests.models.test_hub_cache import GOOD, make
from tests.modelserver.test_vllm_process import eventually, is_gone
from tests.support.paths import CERTIFICATES, ROOT
from tests.support.ports import free_port
from tests.support.unmeasured import unmeasured

# Run as `python -m vllm.entrypoints.openai.api_server`, it answers what the gateway's probes ask.
STAND_IN = """
import ctypes, http.server, json, os, signal, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
model = sys.argv[sys.argv.index("--model") + 1]
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = json.dumps({"object": "list", "data": [{"id": model}], "tokens": [1], "count": 1}).encode()
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
    def log_message(self, *args): pass
if os.environ.get("STAND_IN_DIES"):
    sys.exit("no memory for the cache")
if os.environ.get("STAND_IN_HANGS"):
    signal.pause()
if os.environ.get("STAND_IN_IS_LATE"):
    if os.fork():
        os.wait()
    ctypes.CDLL(None).prctl(1, 9)  # ends with its parent, from which it is another program all the same
    os.setsid()
print("pid", os.getpid(), flush=True)
print(os.environ.get(os.environ.get("STAND_IN_SHOWS", "")), flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

RUN = """
import sys
from gateway.config.load import build, child_environment, load
from gateway.config.model_server_settings import ModelServerSettings
from gateway.commands.up import up
sys.exit(up(build(ModelServerSettings, None), load()[0], child_environment()))
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """What has `up` start the stand-in."""
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    environ = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(tmp_path / "packages"), *sys.path)),
        "GATEWAY_PORT": str(free_port()),
        "GATEWAY_HOST": "127.0.0.1",
        "LLM_VLLM_PORT": str(free_port()),
        "LLM_VLLM_MODEL_NAME": str(model),
        "LLM_VLLM_PYTHON": sys.executable,
    }
    return environ | more


def running(tmp_path: Path, **more: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """`up` in a process of its own, in front of the stand-in."""
    return running_in(environment(tmp_path, **more))


@contextmanager
def running_in(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The same, with this environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Stop both with Ctrl-C" in line:
            return said
    raise AssertionError(said)


def model_server(tmp_path: Path) -> int:
    (log,) = (tmp_path / "vllm-gateway" / "logs").glob("vllm-*.log")
    return int(log.read_text().split()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as process:
        said = until_ready(process)
        assert "Starting vLLM with " in said
        assert "Starting the gateway.\n" in said
        assert '"messages": {"system": "You are a helpful assistant.", "user": "What is Deep Learning?"}' in said
        assert '"messages": [{"role": "user", "content": "Who are you?"}]' in said
        vllm = model_server(tmp_path)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Stopping the gateway and vLLM.\n" in rest
        assert rest.endswith("Stopped.\n")
        assert "Traceback" not in rest
        assert is_gone(vllm)


def test_a_tarball_is_unpacked_and_served_offline(tmp_path: Path) -> None:
    tarball = make(tmp_path / "n.tar", GOOD)
    with running(tmp_path, LLM_VLLM_MODEL_NAME=str(tarball), STAND_IN_SHOWS="HF_HUB_CACHE") as process:
        said = until_ready(process)
        assert "Unpacking the model: 100 %" in said
        assert "Starting vLLM with org/name; " in said
        (cache,) = (tmp_path / "vllm-gateway" / "models").glob("*/n")
        (log,) = (tmp_path / "vllm-gateway" / "logs").glob("vllm-*.log")
        assert log.read_text().splitlines()[1] == str(cache)


def test_an_address_of_a_bucket_is_left_to_a_vllm_that_reads_such(tmp_path: Path) -> None:
    environ = environment(tmp_path, LLM_VLLM_MODEL_NAME="s3://bucket/models/a", STAND_IN_SHOWS="AWS_REGION")
    (tmp_path / "packages" / "runai_model_streamer.py").touch()
    with running_in(environ | {"AWS_REGION": "eu-central-1"}) as process:
        assert "Starting vLLM with s3://bucket/models/a; " in until_ready(process)
        (log,) = (tmp_path / "vllm-gateway" / "logs").glob("vllm-*.log")
        assert log.read_text().splitlines()[1] == "eu-central-1"


def test_ctrl_c_ends_make_up_without_a_word_of_makes(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    # A session's first opening of a terminal makes it the one that Ctrl-C comes from.
    start = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execvp('make', ['make', *os.sys.argv[1:]])"
    venv = Path(sys.executable).parents[1]
    argv = [sys.executable, "-c", start, "--no-print-directory", "-o", f"{venv}/.installed", "up", f"VENV={venv}"]
    environ = environment(tmp_path, TERM="dumb")
    environ.pop("MAKEFLAGS", None)
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environ, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        said = b""
        while b"Stop both with Ctrl-C" not in said:
            said += os.read(master, 4096)
        os.write(master, b"\x03")
        with suppress(OSError):  # as the other end of a terminal has no end of file
            while more := os.read(master, 4096):
                said += more
        assert process.wait(20) in (0, -signal.SIGINT)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert said.endswith(b"\r\nStopped.\r\n"), said
    assert is_gone(model_server(tmp_path))


def test_a_signal_while_it_starts_ends_it_in_good_order(tmp_path: Path) -> None:
    with running(tmp_path, STAND_IN_HANGS="1") as process:
        assert process.stdout is not None
        # On a busy machine a second may have gone by.
        assert any(line.startswith("Starting vLLM: importing PyTorch and vLLM (") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest.endswith("Stopping vLLM.\nStopped.\n")


def test_however_many_signals_come_both_end_and_its_exit_status_is_its_own(tmp_path: Path) -> None:
    with running_in(unmeasured(environment(tmp_path))) as process:
        until_ready(process)
        vllm = model_server(tmp_path)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert rest.endswith("Stopped.\n")
        assert "Traceback" not in rest
        assert is_gone(vllm)


def test_check_finds_it_whatever_its_ports_are(tmp_path: Path) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        argv = [sys.executable, "-m", "gateway", "check"]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, timeout=30)

    with running(tmp_path) as process:
        url = re.findall(r"curl (http://\S+)/v1/chat", until_ready(process))[0]
        found = check()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        gone = check()

    assert (found.returncode, gone.returncode) == (0, 1), found
    assert found.stdout.startswith(f"A call would succeed: the gateway on {url} serves {tmp_path / 'model'}.\n")
    assert f"`up` (process {process.pid}) runs the gateway" in found.stdout
    assert "runs the gateway" not in gone.stdout


def test_a_python_of_this_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "py").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    with running(tmp_path, LLM_VLLM_PYTHON="./py") as process:
        assert "Ready:" in until_ready(process)


def test_a_gateway_that_speaks_tls_is_waited_for(tmp_path: Path) -> None:
    certificate = CERTIFICATES / "other.pem"
    with running(tmp_path, GATEWAY_TLS_CERT_FILE=str(certificate)) as process:
        said = until_ready(process)
        assert "curl" in said
        assert "curl http://" not in said.partition("Ready:")[2]


def test_where_there_are_keys_what_to_try_has_one(tmp_path: Path) -> None:
    key = "sk-4f7d0c9a2b6e81d35a"
    with running(tmp_path, GATEWAY_API_KEYS=key) as process:
        said = until_ready(process)
    tries = re.findall(r"^curl .*", said, re.MULTILINE)
    assert len(tries) == 2
    for command in tries:
        assert '-H "Authorization: Bearer $GATEWAY_CHAT_KEY"' in command
    assert key not in said


def test_a_model_server_that_dies_ends_the_gateway(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        until_ready(process)
        os.kill(model_server(tmp_path), signal.SIGKILL)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "vllm-gateway: The model server ended with -9. The end of its log" in rest


def test_a_gateway_that_dies_ends_the_model_server(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        until_ready(process)
        vllm = model_server(tmp_path)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (front,) = (int(child) for child in children if int(child) != vllm)
        os.kill(front, signal.SIGKILL)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "vllm-gateway: The gateway ended with -9" in rest
        assert is_gone(vllm)


def test_kill_9_leaves_no_orphan(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        until_ready(process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.kill()
        assert eventually(lambda: all(is_gone(int(child)) for child in children))


def test_a_model_server_that_does_not_come_up_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with running(tmp_path, STAND_IN_DIES="1") as process:
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert said.endswith("no memory for the cache\n")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("LLM_VLLM_MODEL_NAME", "no-such-model", "Unknown model 'no-such-model'"),
        ("LLM_VLLM_MODEL_NAME", "none.tar", "There is no tarball none.tar: `vllm-gateway download"),
        ("LLM_VLLM_MODEL_NAME", "s3://bucket", "The address 's3://bucket' names no model: it is s3://BUCKET/FOLDER"),
        ("LLM_VLLM_MODEL_NAME", "s3://bucket/a", "has no Run:ai's Model Streamer for s3://: install vllm[runai] there"),
        ("LLM_VLLM_PYTHON", "/no/such/python", "--vllm-python /no/such/python cannot be run"),
        ("PYTHONPATH", os.pathsep.join(sys.path), "has no vLLM"),
        ("EXTRA_ARGS", "'", "EXTRA_ARGS cannot be split"),
        ("VLLM_APP_CONFIG", "/no/such.json", "/no/such.json (VLLM_APP_CONFIG) cannot be read (No such file"),
        ("GATEWAY_PORT", "0", "GATEWAY_PORT must be a port of your choice"),
        ("VLLM_NODE_RANK", "1", "VLLM_NODE_RANK must be 0 for `up`, which starts the node that answers, but it is 1"),
    ],
)
def test_what_stops_it_before_the_start(tmp_path: Path, name: str, value: str, sentence: str) -> None:
    with running(tmp_path, **{name: value}) as process:
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert sentence in said
        assert "Traceback" not in said


def test_vllm_apps_own_file_starts_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_path": "./model", "top_k": 25}')
    with running(tmp_path, LLM_VLLM_MODEL_NAME="", VLLM_APP_CONFIG=str(tmp_path / "config.json")) as process:
        said = until_ready(process)
        assert f"in front of vLLM with {tmp_path / 'model'}" in said
        argv = Path(f"/proc/{model_server(tmp_path)}/cmdline").read_text().split("\0")
        assert argv[argv.index("--model") + 1] == str(tmp_path / "model")
        assert argv[argv.index("--override-generation-config") + 1] == '{"top_k": 25}'


@pytest.mark.parametrize("setting", ["LLM_VLLM_PORT", "GATEWAY_PORT", "GATEWAY_HEALTH_PORT", "GATEWAY_METRICS_PORT"])
def test_a_port_that_another_has_is_told_before_anything_starts(tmp_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running(tmp_path, **{setting: port}) as process:
            said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.startswith(f"vllm-gateway: Port {port} is in use: ")
    assert said.endswith(f" listens there. End it, or choose another with {setting}.\n")
    if sys.platform == "linux":
        assert f"(process {os.getpid()})" in said
    assert not (tmp_path / "vllm-gateway").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="who listens on a port stands in Linux's /proc")
def test_a_port_that_another_took_while_vllm_starts_is_told(tmp_path: Path) -> None:
    with running(tmp_path, STAND_IN_IS_LATE="1") as process:
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert re.search(r"^vllm-gateway: Port \d+ is in use: .* LLM_VLLM_PORT\.$", said, re.MULTILINE)
        assert "Ready" not in said


def test_both_on_one_port(tmp_path: Path) -> None:
    port = str(free_port())
    with running(tmp_path, GATEWAY_PORT=port, LLM_VLLM_PORT=port) as process:
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert f"cannot both have port {port}" in said


def test_an_accelerator_is_told_of() -> None:
    assert list(up._devices(lambda name: None, lambda path: False)) == []
    both = "".join(up._devices(lambda name: "/bin/" + name, lambda path: False))
    assert "NVIDIA GPU" in both
    assert "Gaudi" in both


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, 10),
        ({"GATEWAY_DRAIN_TIMEOUT": "60"}, 65),
        ({"GATEWAY_DRAIN_TIMEOUT": "60", "GATEWAY_DRAIN_DELAY": "4"}, 69),
    ],
)
def test_the_gateway_gets_as_long_to_end_as_its_drain_may_take(given: dict[str, Any], seconds: float) -> None:
    assert up._gateway_grace(Settings(**given)) == seconds

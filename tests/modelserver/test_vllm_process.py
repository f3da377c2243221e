"""The local vLLM: its command line from the settings, and its life as a process, with a stand-in for vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import respx
from pydantic import SecretStr

from gateway.config.load import build
from gateway.config.model_server_settings import ModelServerSettings
from gateway.modelserver.child_process import Child, last_lines
from gateway.modelserver.model_source import Model, find_model
from gateway.modelserver.preflight import CannotStart
from gateway.modelserver.vllm_process import Launch, ModelServer, launch
from tests.models.test_hub_cache import GOOD, make
from tests.support.ports import free_port
from tests.support.unmeasured import unmeasured

PYTHON = Path("/env/bin/python")

# Serves at once; starts a child of its own, whose number it writes into its log.
STAND_IN = """
import http.server, json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers.get("authorization") == "Bearer sesame" or sys.argv[3] == "open"
        body = json.dumps({"data": [{"id": sys.argv[2]}]} if allowed else {"error": "Unauthorized"}).encode()
        self.send_response((200 if allowed else 401) if self.path == "/v1/models" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("child", child.pid, flush=True)
server.serve_forever()
"""


def settings(**given: object) -> ModelServerSettings:
    return build(ModelServerSettings, None, **given)


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Ask until it holds; for what another process does in its own time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.02)
    return False


def is_gone(pid: int) -> bool:
    """Whether no such process runs; one that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def stand_in(
    tmp_path: Path, *options: str, name: str = "demo", door: str = "open", key: str | None = None
) -> tuple[ModelServer, Path]:
    port = free_port()
    log = tmp_path / "logs" / "vllm.log"
    argv = [sys.executable, "-c", STAND_IN, str(port), name, door, *options]
    return ModelServer(Launch(argv, dict(os.environ)), port, log, key), log


@contextlib.contextmanager
def another(port: int, name: str) -> Iterator[None]:
    """Another server on the port, in a process that is no child of the model server's."""
    argv = [sys.executable, "-c", STAND_IN, str(port), name, "open"]
    with Child(argv, dict(os.environ), piped=True) as child:
        next(child.lines(600))
        yield


def child_of(log: Path) -> int:
    assert eventually(lambda: "child" in log.read_text())
    return int(log.read_text().split()[1])


def test_the_demo_models_command() -> None:
    secrets = {"GATEWAY_API_KEYS": "sk-1", "GATEWAY_API_KEYS_FILE": "keys", "LLM_VLLM_CLIENT_SECRET": "s"}
    argv, environment, _ = launch(settings(), PYTHON, "/demo", {"PATH": "/bin"} | secrets, demo=True)
    assert argv[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert " ".join(argv[3:]) == (
        "--model /demo --host 127.0.0.1 --port 8008 "
        "--served-model-name demo-model --dtype float32 --max-model-len 4096 --enforce-eager"
    )
    assert environment == {
        "PATH": "/bin",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def test_every_setting_has_its_place() -> None:
    given = settings(
        port=8100,
        revision="main",
        served_name="name",
        config="/c.yaml",
        quantization="awq",
        dtype="bfloat16",
        max_num_seqs=4,
        max_model_len=2048,
        max_num_batched_tokens=512,
        gpu_memory_utilization="0.90",
        eager=True,
        tp_size=2,
        pp_size=1,
        nnodes=2,
        node_rank=0,
        master_addr="10.0.0.1",
        distributed_executor_backend="mp",
        shutdown_timeout=20,
        chat_template="/t.jinja",
        cpu_kvcache_space=8,
        hf_token=SecretStr("hf_secret"),
        extra_args="--kv-cache-dtype fp8_e5m2 --override-generation-config '{\"a\": 1}'",
    )
    environ = {"VLLM_DTYPE": "bfloat16", "VLLM_CPU_OMP_THREADS_BIND": "0-3", "HF_HUB_OFFLINE": "0"}
    argv, environment, grace = launch(given, PYTHON, "org/name", environ, ["--more", "1"])
    assert grace == 40
    assert " ".join(argv[3:-1]) == (
        "--model org/name --host 127.0.0.1 --port 8100 --more 1 --revision main --served-model-name name "
        "--dtype bfloat16 --max-model-len 2048 --max-num-seqs 4 --max-num-batched-tokens 512 "
        "--gpu-memory-utilization 0.9 --tensor-parallel-size 2 --pipeline-parallel-size 1 "
        "--distributed-executor-backend mp --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --shutdown-timeout 20 "
        "--chat-template /t.jinja --config /c.yaml --quantization awq --enforce-eager "
        "--kv-cache-dtype fp8_e5m2 --override-generation-config"
    )
    assert argv[-1] == '{"a": 1}'
    assert "hf_secret" not in " ".join(argv)
    assert environment == {
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
        "HF_HUB_OFFLINE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "8",
        "HF_TOKEN": "hf_secret",
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("VLLM_EAGER", "1", "--enforce-eager"),
        ("GPU_MEM_UTILIZATION", "0.8", "--gpu-memory-utilization 0.8"),
        ("GPU_MEM_ULTIIZATION", "0.8", "--gpu-memory-utilization 0.8"),
        ("MAX_TOKENS", "1024", "--max-model-len 1024"),
        ("MAX_CONCURRENT_REQUESTS", "8", "--max-num-seqs 8"),
        ("MAX_CONCURRENT_TOKENS", "2048", "--max-num-batched-tokens 2048"),
    ],
)
def test_vllm_apps_own_names(name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    argv, environment, _ = launch(settings(), PYTHON, "m", {name: value})
    assert " ".join(argv).endswith(f"--port 8008 {expected}")
    assert "VLLM_EAGER" not in environment


def test_a_person_may_have_the_demo_model_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EAGER", "0")
    monkeypatch.setenv("MAX_TOKENS", "1024")
    argv, *_ = launch(settings(), PYTHON, "/demo", {}, demo=True)
    assert " ".join(argv).endswith("--dtype float32 --max-model-len 1024")


def test_extra_args_that_no_shell_would_take() -> None:
    with pytest.raises(CannotStart, match=r"EXTRA_ARGS cannot be split as a shell would \(No closing quotation\)"):
        launch(settings(extra_args="--a 'b"), PYTHON, "m", {})


def test_it_starts_answers_and_ends_with_all_its_processes(tmp_path: Path) -> None:
    server, log = stand_in(tmp_path)
    with server:
        server.wait_ready()
        assert server.exit_code() is None
        child = child_of(log)
        assert not is_gone(child)
    assert eventually(lambda: is_gone(child))
    assert log.stat().st_mode & 0o777 == 0o600
    server.stop()
    assert not server.is_ready()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "demo"),
        (["--model", "/m/demo"], "/m/demo"),
        (["--model", "/m/demo", "--served-model-name", "one", "two", "--port", "1"], "two"),
        (["--served-model-name", "one", "--served_model_name=two"], "two"),
        (["--model", "/m/demo", "--config", "vllm.yaml"], "as the file says"),
    ],
)
def test_it_is_ready_when_it_lists_the_name_that_it_was_given(tmp_path: Path, options: list[str], name: str) -> None:
    server, _ = stand_in(tmp_path, *options, name=name)
    with server:
        server.wait_ready()


def test_one_that_lists_another_name_is_not_ready(tmp_path: Path) -> None:
    server, log = stand_in(tmp_path, "--model", "wanted", name="other")

    class Waited(Exception):
        pass

    def pause(_: float) -> None:
        if "child" in log.read_text() and _lists(server.url):
            assert not server.is_ready()
            raise Waited

    with server, pytest.raises(Waited):
        server.wait_ready(pause)


def _lists(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="who listens on a port stands in Linux's /proc")
def test_another_server_that_took_its_port_meanwhile_is_told_at_once(tmp_path: Path) -> None:
    port = free_port()
    argv = [sys.executable, "-c", "import time; time.sleep(600)", "--model", "demo"]
    server = ModelServer(Launch(argv, {}), port, tmp_path / "log")
    with (
        server,
        another(port, "demo"),
        pytest.raises(CannotStart, match=rf"Port {port} is in use: python\S* \(process \d+\) listens there"),
    ):
        server.wait_ready()


def test_a_model_server_that_takes_the_key_is_ready_and_one_that_refuses_it_is_told(tmp_path: Path) -> None:
    server, _ = stand_in(tmp_path, door="locked", key="sesame")
    with server:
        server.wait_ready()

    server, _ = stand_in(tmp_path, door="locked", key="wrong")
    with server, pytest.raises(CannotStart, match=r"refuses the gateway's key \(401\): .* LLM_VLLM_API_KEY"):
        server.wait_ready()


def test_one_that_dies_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    script = "print('first'); raise SystemExit('out of memory')"
    server = ModelServer(Launch([sys.executable, "-c", script], {}), free_port(), log)
    with server, pytest.raises(CannotStart, match=r"ended with 1\. The end of its log, .*log:\n(.*\n)*out of memory"):
        server.wait_ready()


# As vLLM 0.32 logs a worker that dies: the others' ends follow, then its own, which is in good order.
DIES = """
mark = "(Worker_PP1 pid=7) ERROR 12-01 16:28:28 [multiproc_executor.py:1063]"
print(mark, 'Traceback (most recent call last):')
print(mark, '  File "gpu_model_runner.py", line 3175, in sync_and_gather_intermediate_tensors')
print(mark, '    assert self.intermediate_tensors is not None')
print(mark, '           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^')
print(mark, 'AssertionError')
print('(EngineCore pid=5) ERROR 12-01 16:28:28 [core.py:1512] KeyError: 7')
for line in range(30):
    print('INFO: Shutting down', line)
"""


def test_one_whose_worker_died_is_told_with_that_ones_error(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    server = ModelServer(Launch([sys.executable, "-c", DIES], {}), free_port(), log)
    with server, pytest.raises(CannotStart) as raised:
        server.wait_ready()
    told, end = str(raised.value).split(f"The end of its log, {log}:\n")
    sentence, *lines = told.splitlines()
    assert sentence == "The model server ended with 0. Its first error:"
    assert [line.partition("] ")[2].strip(" ^") for line in lines[1:]] == [
        "assert self.intermediate_tensors is not None",
        "",
        "AssertionError",
    ]
    assert "line 3175" in lines[0]
    assert end.splitlines()[-1] == "INFO: Shutting down 29"


def test_what_a_start_is_about_is_told_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = ModelServer(Launch(["python"], {}), 1, log)
    steps = [server.step()]
    with log.open("a") as file:
        for more in (
            "(APIServer pid=1) INFO [api_utils.py:286] non-default args: {'host': '127.0.0.1'}\n",
            "(APIServer pid=1) INFO [model.py:733] Resolved arch",
            "itecture: LlamaForCausalLM\n",
            "",
            "(Worker pid=3) Starting to load model /m...\n(Worker pid=3) Loading weights took 0.02 seconds\n",
            "(EngineCore pid=2) INFO [core.py:133] Initializing a V1 LLM engine (of another rank)\n",
            "(APIServer pid=1) INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:1\n",
        ):
            file.write(more)
            file.flush()
            steps.append(server.step())
    assert steps == [
        "importing PyTorch and vLLM",
        "reading the model's config",
        "reading the model's config",
        "starting its engine",
        "starting its engine",
        "trying the model",
        "trying the model",
        "opening its port",
    ]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    server = ModelServer(Launch(["/no/such/python"], {}), 1, tmp_path / "log")
    with pytest.raises(CannotStart, match=r"cannot be started: .*No such file"):
        server.start()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    child = Child([sys.executable, "-c", script], {}, log=log, grace=0.1)
    child.start()
    pid = child.pid
    assert pid is not None
    assert eventually(lambda: "on" in log.read_text())
    child.stop()
    assert is_gone(pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells a child that its parent died")
def test_even_kill_9_of_the_parent_leaves_no_orphan(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Its server ends its own children on SIGTERM, as vLLM does.
    server = (
        "import os, signal, subprocess, sys; child = subprocess.Popen(['sleep', '600']);"
        "signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit()));"
        "print('child', child.pid, os.getpid(), flush=True); child.wait()"
    )
    parent_script = (
        "import os, sys, time; from pathlib import Path; from gateway.modelserver.child_process import Child;"
        "Child([sys.executable, '-c', sys.argv[1]], os.environ, log=Path(sys.argv[2])).start(); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_script, server, str(log)])
    try:
        assert eventually(lambda: log.exists() and log.read_text().endswith("\n"))
        _, child, leader = log.read_text().split()
        parent.send_signal(signal.SIGKILL)
        assert eventually(lambda: is_gone(int(child)) and is_gone(int(leader)))
    finally:
        parent.kill()
        parent.wait()


def test_signals_that_raise_while_it_is_watched_do_not_keep_it_from_being_ended() -> None:
    script = """
import os, signal, sys
from gateway.modelserver.child_process import Child
class Stopped(Exception): pass
def stop(*_): raise Stopped
signal.signal(signal.SIGALRM, stop)
with Child([sys.executable, "-c", "import time; time.sleep(600)"], os.environ, grace=0.1) as child:
    for _ in range(500):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0002)
            while True:
                assert child.exit_code() is None
        except Stopped:
            pass
"""
    done = subprocess.run([sys.executable, "-c", script], env=unmeasured(), timeout=60, check=False)
    assert done.returncode == 0


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_text("\n".join(map(str, range(100_000))))
    assert last_lines(log, 2) == "99998\n99999"


def test_a_folder_is_a_model_if_it_has_a_config(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"holds no model: it has no config\.json"):
        find_model(str(tmp_path), {})
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), {}) == Model(str(tmp_path), local=True)


def test_a_tarball_is_served_by_its_models_name(tmp_path: Path) -> None:
    found = find_model(str(make(tmp_path / "n.tar.gz", GOOD)), {"XDG_CACHE_HOME": str(tmp_path)})
    assert (found.name, found.local) == ("org/name", True)
    (cache,) = (tmp_path / "vllm-gateway" / "models").glob("*/n")
    assert found.environment == {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def test_what_is_wrong_with_a_tarball_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"^There is no tarball .*/none\.tar: `vllm-gateway download"):
        find_model(str(tmp_path / "none.tar"), {"XDG_CACHE_HOME": str(tmp_path)})
    (tmp_path / "odd.tar").write_bytes(b"x" * 10_000)
    with pytest.raises(CannotStart, match=r"odd\.tar is no whole tarball"):
        find_model(str(tmp_path / "odd.tar"), {"XDG_CACHE_HOME": str(tmp_path)})


def test_a_bucket_is_vllms_to_read() -> None:
    for name in ("s3://bucket/models/llama/0123456", "s3://my.bucket-1/x/"):
        assert find_model(name, {}) == Model(name, local=False)


@pytest.mark.parametrize("name", ["s3://", "s3://bucket", "s3://bucket/", "s3://bucket/a b", "s3://Bucket/a"])
def test_an_address_without_a_model_is_told(name: str) -> None:
    with pytest.raises(CannotStart, match="names no model: it is s3://BUCKET/FOLDER"):
        find_model(name, {})


def test_a_model_in_the_local_cache_needs_no_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert find_model("org/name", {"HF_HUB_CACHE": str(tmp_path)}) == Model("org/name", local=True)


@pytest.mark.parametrize("name", ["gpt", "a/b/c", "../x", "org/", "http://x/y"])
def test_what_is_neither_a_folder_nor_a_name(name: str) -> None:
    with pytest.raises(CannotStart, match="Unknown model"):
        find_model(name, {})


@pytest.mark.parametrize(
    ("status", "token", "sentence"),
    [
        (404, None, "Unknown model org/name"),
        (401, None, "start again with HF_TOKEN set"),
        (403, "t", "its HF_TOKEN may not read it"),
        (500, None, "answers 500"),
    ],
)
def test_what_the_hub_says(status: int, token: str | None, sentence: str, tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": "http://hub.test/", "HF_HOME": str(tmp_path)}
    with respx.mock() as hub:
        asked = hub.head("http://hub.test/org/name/resolve/main/config.json").respond(status)
        with pytest.raises(CannotStart) as caught:
            find_model("org/name", environ, token)
    assert sentence in str(caught.value)
    assert asked.calls[0].request.headers.get("authorization") == (f"Bearer {token}" if token else None)


def test_a_model_that_the_hub_has(tmp_path: Path) -> None:
    with respx.mock() as hub:
        hub.head("http://hub.test/org/name/resolve/main/config.json").respond(200)
        found = find_model("org/name", {"HF_ENDPOINT": "http://hub.test", "HF_HOME": str(tmp_path)})
    assert found == Model("org/name", local=False)


def test_no_hub(tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": "http://hub.test", "HF_HOME": str(tmp_path)}
    with respx.mock() as hub:
        hub.head("http://hub.test/org/name/resolve/main/config.json").mock(side_effect=httpx.ConnectError("no"))
        with pytest.raises(CannotStart, match=r"No hub: http://hub\.test cannot be reached for the model org/name"):
            find_model("org/name", environ)
    with pytest.raises(CannotStart, match=r"No hub: .* HF_HUB_OFFLINE is set"):
        find_model("org/name", environ | {"HF_HUB_OFFLINE": "1"})

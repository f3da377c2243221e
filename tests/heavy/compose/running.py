"""The stack as operators run it: built, up, asked, hurt and down, with the real vLLM and the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.heavy.compose.rendered import GATEWAY, MODEL_SERVER, environment
from tests.support.paths import AUTHORITY, ROOT

CHAT = "http://127.0.0.1:9000/v1/chat/completions"
UP = ["--env-file", "docker/cpu/.env", "up", "--detach"]
FIRST_CALLS = (ROOT / "docs/first-calls.md").read_text()
REQUESTS = re.findall(r"```sh\n(curl .*?)```", FIRST_CALLS, re.DOTALL)


def run(*command: str, given: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """Its standard output; fails with all that it said. `given` are settings."""
    done = subprocess.run(
        command, cwd=folder, env=environment(**(given or {})), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def eventually(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.2)


def inspected(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
    return found


def health() -> httpx.Response | None:
    try:
        return httpx.get("http://127.0.0.1:9000/v1/health_check", trust_env=False, timeout=10)
    except httpx.HTTPError:
        return None


def serves() -> bool:
    found = health()
    return found is not None and found.status_code == httpx.codes.OK


def loads() -> bool:
    """Once the engine knows the model server's name, which it may not when the gateway first asks for it."""
    found = health()
    if found is None:
        return False
    assert found.status_code == httpx.codes.SERVICE_UNAVAILABLE
    return [upstream["state"] for upstream in found.json()["upstreams"]] == ["loading"]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, a small cache, and proxies behind which there is nobody."""
    data = tmp_path_factory.mktemp("data")
    for folder in [data, *data.parents[:2]]:
        folder.chmod(0o755)
    run(str(ROOT / ".venv/bin/vllm-gateway"), "demo-model", str(data / "demo-model"))
    return {
        "LLM_VLLM_DATA_DIR": str(data),
        "LLM_VLLM_MODEL_NAME": "/data/demo-model",
        "SERVED_MODEL_NAME": "demo-model",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_DTYPE": "float32",
        "EXTRA_ARGS": "--enforce-eager",
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }


@pytest.fixture(scope="session")
def stack(settings: dict[str, str]) -> Iterator[dict[str, str]]:
    """All of it, ready; yields the settings that it runs with."""
    assert os.getuid() == 0, "crashes are made from outside of the containers, which takes root"
    assert run("docker", "ps", "--quiet", "--filter", "name=llm-vllm-") == "", "a stack runs already: end it first"
    try:
        run("docker", "compose", *UP[:2], "--profile", "quantize", "build")  # not behind the dead proxies
        run("docker", "compose", *UP, given=settings)
        eventually(loads, 30)
        run("docker", "compose", *UP, "--wait", "--wait-timeout", "400", given=settings)
        eventually(serves, 30)
        yield settings
    finally:
        try:
            # Shown with a failure.
            sys.stdout.write(run("docker", "compose", "logs", "--no-color", "--tail", "100"))
        finally:
            run("docker", "compose", "down", "--remove-orphans")


def test_the_first_calls_are_answered(stack: dict[str, str]) -> None:
    whole, streamed, checked, vllm = (run("bash", "-c", f"curl -sS {request[4:]}") for request in REQUESTS)
    answer = json.loads(whole)
    assert answer["text"].startswith("Deep learning is a branch of machine learning")
    assert answer["model"] == "demo-model"
    assert streamed == "data: ''\n\ndata: 'My'\n\ndata: ' name'\n\ndata: ' is'\n\ndata: [DONE]\n\n"
    assert json.loads(checked)["status"] == "serving"
    assert "Deep learning" in json.loads(vllm)["choices"][0]["text"]


def test_the_image_tells_what_is_in_it(stack: dict[str, str]) -> None:
    bill = json.loads(run("docker", "exec", GATEWAY, "cat", "/opt/gateway/sbom.json"))
    held = {f"{one['name']}=={one['version']}".lower().replace("_", "-") for one in bill["components"]}
    locked = re.findall(r"^([\w.-]+==[\w.+]+)", (ROOT / "requirements/image.lock").read_text(), re.MULTILINE)
    assert bill["metadata"]["component"]["name"] == "vllm-gateway"
    assert len(held) > 20
    assert held <= {name.lower() for name in locked}


def test_the_gateway_can_write_nothing_but_its_tmp(stack: dict[str, str]) -> None:
    state = inspected(GATEWAY)
    assert state["HostConfig"]["ReadonlyRootfs"] is True
    assert state["HostConfig"]["CapDrop"] == ["ALL"]
    assert state["Config"]["User"] == "1000:1000"
    assert state["State"]["Health"]["Status"] == "healthy"
    writes = """
import os
open("/tmp/a", "w").close()
print(os.getuid(), *(place for place in ("/", "/opt/gateway", "/etc") if os.access(place, os.W_OK)))
"""
    assert run("docker", "exec", GATEWAY, "python", "-c", writes).split() == ["1000"]


def test_the_containers_are_bounded(stack: dict[str, str]) -> None:
    for name in (GATEWAY, MODEL_SERVER):
        host = inspected(name)["HostConfig"]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        limit = run("docker", "exec", name, "sh", "-c", "ulimit -Hn")
        assert limit.split() == ["16384"]


def test_vllm_is_no_root_and_keeps_its_files_in_the_data_folder(stack: dict[str, str]) -> None:
    assert inspected(MODEL_SERVER)["Config"]["User"] == "1000:1000"
    assert os.stat(stack["LLM_VLLM_DATA_DIR"]).st_uid == 1000


def test_a_model_server_that_dies_is_told_of_and_comes_back(stack: dict[str, str]) -> None:
    call = {
        "model": "demo-model",
        "messages": [{"role": "user", "content": "Who are you?"}],
        "stream": True,
        "max_tokens": 3900,
        "ignore_eos": True,
    }
    with httpx.stream("POST", CHAT, json=call, trust_env=False, timeout=60) as answer:
        assert answer.status_code == httpx.codes.OK
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(3):
            assert "error" not in json.loads(next(lines).removeprefix("data: "))
        # As a crash: what `docker kill` ends stays ended.
        os.kill(inspected(MODEL_SERVER)["State"]["Pid"], signal.SIGKILL)
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_broken"
    assert done == "data: [DONE]"
    eventually(lambda: not serves(), 10)
    eventually(serves, 200)
    assert json.loads(run("bash", "-c", f"curl -sS {REQUESTS[0][4:]}"))["text"]


def log_once_it_answers() -> str:
    """The model server's, after an answer that is right."""
    eventually(serves, 30)
    answer = json.loads(run("bash", "-c", f"curl -sS {REQUESTS[0][4:]}"))
    assert answer["text"].startswith("Deep learning is a branch of machine learning")
    done = subprocess.run(["docker", "logs", MODEL_SERVER], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout + done.stderr


def swap(files: Path, name: str, number: int) -> None:
    """As Kubernetes does it: a file is a link into a folder that is a link, of which another takes the place."""
    folder = files / f"..{number}"
    folder.mkdir()
    shutil.copy(AUTHORITY.parent / name, folder / "tls.pem")
    (folder / "tls.pem").chmod(0o644)
    (files / "..new").symlink_to(folder.name)
    os.replace(files / "..new", files / "..data")


def test_a_revoked_key_and_a_renewed_certificate_count_within_seconds(
    stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = tmp_path_factory.mktemp("files")
    files.chmod(0o755)
    (files / "tls.pem").symlink_to("..data/tls.pem")
    swap(files, "good.pem", 1)
    keys = ["sk-4f7d0c9a2b6e81d35a", "sk-9e01b7c64f2a83d5c7"]

    def write(name: str, key: str) -> None:
        (files / "keys~").write_text(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
        os.replace(files / "keys~", files / "keys")

    write("one", keys[0])
    given = {"LLM_USVC_FILES": str(files), "GATEWAY_API_KEYS_FILE": "keys", "GATEWAY_TLS_CERT_FILE": "tls.pem"}
    trusts = ssl.create_default_context(cafile=AUTHORITY)
    with httpx.Client(base_url="https://127.0.0.1:9000", verify=trusts, trust_env=False, timeout=60) as client:

        def status(key: str) -> int | None:
            try:
                return client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
            except httpx.HTTPError:
                return None

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", 9000))

        try:
            run("docker", "compose", *UP, GATEWAY, given=stack | given)
            eventually(lambda: status(keys[0]) == 200, 60)
            call = {"messages": {"user": "Hi"}, "max_new_tokens": 3000, "ignore_eos": True}
            bearer = {"authorization": f"Bearer {keys[0]}"}
            with client.stream("POST", "/v1/chat/completions", json=call, headers=bearer) as stream:
                lines = stream.iter_lines()
                next(lines)
                first = shown()
                write("two", keys[1])
                swap(files, "other.pem", 2)
                eventually(lambda: status(keys[0]) == 401 and status(keys[1]) == 200 and shown() != first, 10)
                assert "data: [DONE]" in list(lines)
            log = run("docker", "logs", GATEWAY)
            assert "keys read again: 1; new: two; gone: one" in log
            assert "certificate read again, good until 2120-01-01" in log
        finally:
            run("docker", "compose", *UP, GATEWAY, given=stack)
    eventually(serves, 30)


@pytest.fixture(scope="session")
def log_with_key(stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The log of a model server that was started anew, with FP8 and with a key that stands in a file."""
    key = tmp_path_factory.mktemp("secrets") / "key"
    key.parent.chmod(0o755)
    key.write_text("key-of-a-file\n")
    given = stack | {"IF_FP8_QUANTIZATION": "true", "LLM_VLLM_API_KEY_FILE": str(key)}
    run("docker", "compose", *UP, "--wait", "--wait-timeout", "200", given=given)
    return log_once_it_answers()


def test_a_key_in_a_file_reaches_both_and_stands_in_no_environment(log_with_key: str) -> None:
    auth = {"Authorization": "Bearer key-of-a-file"}
    bare = httpx.get("http://127.0.0.1:8008/v1/models", trust_env=False)
    keyed = httpx.get("http://127.0.0.1:8008/v1/models", headers=auth, trust_env=False)
    assert (bare.status_code, keyed.status_code) == (401, 200)
    assert "key-of-a-file" not in run("docker", "inspect", GATEWAY, MODEL_SERVER) + log_with_key


def test_one_word_turns_the_cache_to_fp8(log_with_key: str) -> None:
    log = log_with_key
    assert "/data/fp8/demo-model, so that only the cache is in FP8" in log
    assert "Using fp8_e5m2 data type to store kv cache" in log


def test_a_checkpoint_in_fp8_is_made_and_then_served(stack: dict[str, str]) -> None:
    given = stack | {"IF_FP8_QUANTIZATION": "true"}
    said = run("docker", "compose", *UP[:2], "run", "--rm", "quantize", given=given)
    assert "/data/fp8/demo-model: /data/demo-model as FP8_DYNAMIC." in said
    made = Path(stack["LLM_VLLM_DATA_DIR"]) / "fp8" / "demo-model"
    assert made.stat().st_uid == 1000
    run("docker", "compose", *UP, "--force-recreate", "--wait", "--wait-timeout", "200", MODEL_SERVER, given=given)
    log = log_once_it_answers()
    assert "Starting: vllm serve /data/fp8/demo-model" in log
    assert "CompressedTensorsW8A8Fp8" in log


def test_what_the_dashboard_draws_is_what_the_two_tell_of_themselves(stack: dict[str, str]) -> None:
    drawn = (ROOT / "compose/monitoring/grafana/dashboards/vllm-gateway.json").read_text()
    queries = [target["expr"] for panel in json.loads(drawn)["panels"] for target in panel["targets"]]
    # The gateway's own, and vLLM's; what every process has, by which of the two it is asked for.
    jobs = {
        "gateway": (9464, r"gateway_\w+|process_\w+(?={job=.gateway)"),
        "vllm": (8008, r"vllm:\w+|process_\w+(?={job=.vllm)"),
    }
    for port, pattern in jobs.values():
        names = {name for query in queries for name in re.findall(pattern, query)}
        told = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert len(names) > 5
        # What has no series yet, as those of keys where there are none, is told of all the same.
        known = set(re.findall(r"^# HELP (\S+)", told, re.MULTILINE))
        assert {name for name in names if name.removesuffix("_bucket") not in known} == set()


def test_a_folder_that_cannot_be_written_is_told_of_at_once(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    given = settings | {"LLM_VLLM_DATA_DIR": str(tmp_path)}
    options = ["--project-name", "unwritable", "--env-file", "docker/cpu/.env"]
    try:
        done = subprocess.run(
            ["docker", "compose", *options, "up", "llm-vllm-data"],
            cwd=ROOT,
            env=environment(**given),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        run("docker", "compose", *options, "down", given=given)
    assert "exited with code 1" in done.stdout
    assert f"/data (LLM_VLLM_DATA_DIR) belongs to user {os.getuid()}, and user 1000 cannot write there" in done.stderr


def test_down_from_another_folder_leaves_nothing(stack: dict[str, str]) -> None:
    run("docker", "compose", "down", folder=ROOT / "docker" / "cpu")
    ours = "label=com.docker.compose.project=vllm-gateway"
    for kind in (["ps", "--all"], ["network", "ls"], ["volume", "ls"]):
        assert run("docker", *kind, "--quiet", "--filter", ours) == ""
    assert (Path(stack["LLM_VLLM_DATA_DIR"]) / "demo-model" / "config.json").exists()


def test_down_takes_what_a_profile_has_started(settings: dict[str, str]) -> None:
    run(
        "docker",
        "compose",
        *UP[:2],
        "create",
        "--no-recreate",
        "quantize",
        given=settings | {"COMPOSE_PROFILES": "quantize"},
    )
    run("docker", "compose", "--profile", "*", "down")
    ours = "label=com.docker.compose.project=vllm-gateway"
    assert run("docker", "ps", "--all", "--quiet", "--filter", ours) == ""

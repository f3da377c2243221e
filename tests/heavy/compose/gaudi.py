"""The stack for Gaudi on a machine without one, up to the point where the hardware is needed.

Docker's runtime `habana` is runc under that name here, hl-smi a script, and Gaudi's image the CPU's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.heavy.compose.rendered import FP8, MODEL_SERVER, environment
from tests.heavy.compose.running import eventually, inspected, run
from tests.support.paths import ROOT

DAEMON = Path("/etc/docker/daemon.json")
# The CPU's, with pandas: Gaudi's own image has that.
IMAGE = "vllm-gateway-quantize:cpu"


def has_habana() -> bool:
    return "habana" in json.loads(run("docker", "info", "--format", "{{json .Runtimes}}"))


def set_runtimes(settings: dict[str, object]) -> None:
    DAEMON.write_text(json.dumps(settings))
    (pid,) = run("pgrep", "-x", "dockerd").split()
    os.kill(int(pid), signal.SIGHUP)


@pytest.fixture(scope="module")
def habana() -> Iterator[None]:
    """The engine has the runtime; at the end it is as it was."""
    if has_habana():
        yield
        return
    before = DAEMON.read_text() if DAEMON.exists() else None
    settings = {"runtimes": {}, **json.loads(before or "{}")}
    DAEMON.parent.mkdir(exist_ok=True)
    try:
        set_runtimes(settings | {"runtimes": settings["runtimes"] | {"habana": {"path": shutil.which("runc")}}})
        eventually(has_habana, 20)
        yield
    finally:
        # Said to be none, as what the file no longer says stays as it was.
        set_runtimes(settings)
        eventually(lambda: not has_habana(), 20)
        if before is None:
            DAEMON.unlink()
        else:
            DAEMON.write_text(before)


@pytest.fixture(scope="module")
def given(habana: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings: the demo model in a data folder, stand-ins for image and scripts."""
    data, tools = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tools")
    for folder in [data, *data.parents[:2]]:
        folder.chmod(0o755)
    run(str(ROOT / ".venv/bin/vllm-gateway"), "demo-model", str(data / "demo-model"))
    shutil.copy(ROOT / "tests/heavy/datasets/pandas-1.5.pkl", data / "questions.pkl")
    os.chown(data, 1000, 1000)  # as it is where the person who put the dataset there has made it
    (tools / "hl-smi").write_text("#!/bin/sh\necho 1.24.1-abcdef\n")
    (tools / "hl-smi").chmod(0o755)
    run("docker", "compose", "--env-file", "docker/cpu/.env", "--profile", "quantize", "build", "quantize")
    try:
        yield {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LLM_VLLM_IMAGE": IMAGE,
            "LLM_VLLM_DATA_DIR": str(data),
            "LLM_VLLM_MODEL_NAME": "/data/demo-model",
            "VLLM_GAUDI_SOURCE": str(ROOT / "tests/heavy/compose/vllm-gaudi"),
            "HF_HUB_OFFLINE": "1",
        }
    finally:
        run("docker", "compose", *FP8, "down", "--remove-orphans")


def log() -> str:
    done = subprocess.run(["docker", "logs", MODEL_SERVER], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout + done.stderr


def run_vllm(given: dict[str, str]) -> str:
    return run("./run_vllm.sh", given=given)


def calibrate(given: dict[str, str]) -> str:
    """All that is said."""
    done = subprocess.run(
        ["docker", "compose", *FP8, "up", "--build"],
        cwd=ROOT,
        env=environment(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def test_the_model_server_is_started_for_gaudi(given: dict[str, str]) -> None:
    assert "vLLM starts" in run_vllm(given)
    eventually(lambda: "Starting: " in log(), 30)
    state = inspected(MODEL_SERVER)
    assert state["HostConfig"]["Runtime"] == "habana"
    assert state["HostConfig"]["IpcMode"] == "host"
    assert state["HostConfig"]["CapAdd"][0].endswith("SYS_NICE")
    assert {"HABANA_VISIBLE_DEVICES=all", "OMPI_MCA_btl_vader_single_copy_mechanism=none"} <= set(
        state["Config"]["Env"]
    )
    assert (
        "Starting: vllm serve /data/demo-model --host 0.0.0.0 --port 8008 --dtype bfloat16 --max-model-len 4096 "
        "--max-num-seqs 256 --block-size 128 --tensor-parallel-size 1 --pipeline-parallel-size 1 "
        "--chat-template /opt/templates/neural-chat.jinja\n"
    ) in log()


def test_fp8_without_scales_says_how_to_make_them(given: dict[str, str]) -> None:
    run_vllm(given | {"IF_FP8_QUANTIZATION": "true"})
    eventually(lambda: "There are no scales in /data/inc/demo-model" in log(), 30)
    assert "make them with docker/hpu/fp8/docker-compose.yaml" in log()
    run("docker", "compose", "--env-file", "docker/hpu/.env", "down", given=given)


def test_a_calibration_needs_a_dataset_in_the_data_folder(given: dict[str, str]) -> None:
    for more, expected in (
        ({}, "Gaudi's FP8 is calibrated: set FP8_DATASET_PATH"),
        (
            {"FP8_DATASET_PATH": "/home/me/questions.pkl"},
            "There is no dataset /home/me/questions.pkl: put the file into",
        ),
    ):
        said = calibrate(given | more)
        assert "quantize-1 exited with code 1" in said
        assert expected in said


def test_a_calibration_leaves_its_scales_where_serving_finds_them(given: dict[str, str]) -> None:
    settings = given | {"FP8_DATASET_PATH": "/data/questions.pkl", "VLLM_TP_SIZE": "2", "FP8_DATASET_SAMPLES": "2"}
    said = calibrate(settings)
    assert "-m /data/demo-model -d " in said
    assert "/calibration/dataset.pkl -o /data/inc -t 2 -b 32" in said
    assert "Calibrating with 2 questions of /data/questions.pkl." in said
    assert "HABANA_VISIBLE_DEVICES=all" in said
    assert "HF_HOME=/data" in said
    assert "Calibrated: /data/inc/demo-model/maxabs_quant_g3.json." in said
    scales = Path(given["LLM_VLLM_DATA_DIR"]) / "inc/demo-model/maxabs_quant_g3.json"
    assert scales.stat().st_uid == 1000
    run_vllm(given | {"IF_FP8_QUANTIZATION": "true"})
    # Here the hardware is needed: without it there is no such kind of quantization.
    eventually(lambda: "Starting: " in log() and "inc" in log().partition("Starting: ")[2].partition("\n")[2], 90)
    assert "--quantization inc --kv-cache-dtype fp8_inc" in log()
    pid = inspected(MODEL_SERVER)["State"]["Pid"]
    assert "QUANT_CONFIG=/data/inc/demo-model/maxabs_quant_g3.json" in Path(f"/proc/{pid}/environ").read_text().split(
        "\0"
    )

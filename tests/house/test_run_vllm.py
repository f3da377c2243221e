"""run_vllm.sh on machines that have, and have not, what a device needs; the commands that it asks are stand-ins."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "run_vllm.sh"

STAND_INS = {
    "docker": """case "$*" in
  "compose version --short") [ -n "$COMPOSE" ] && echo "$COMPOSE" ;;
  info*) [ -n "$RUNTIMES" ] && echo "$RUNTIMES" ;;
  *"config --images"*) echo "vault.habana.ai/gaudi-docker/1.24.1/ubuntu24.04/habanalabs/vllm:latest" ;;
  *config) echo "      CUDA_VISIBLE_DEVICES: \\"$CUDA_VISIBLE_DEVICES\\"" ;;
  *"config llm-vllm-model-server")
    for name in VLLM_NNODES VLLM_NODE_RANK VLLM_MASTER_ADDR VLLM_TP_SIZE VLLM_PP_SIZE VLLM_CONFIG EXTRA_ARGS; do
      eval "echo \\"      $name: \\\\\\"\\$$name\\\\\\"\\""
    done ;;
  *) echo "$*" ;;
esac""",
    "hl-smi": 'for _ in 1 2 3 4 5 6 7 8; do echo "$DRIVER"; done',
    "nvidia-smi": 'echo "$GPUS"; echo "$*" >&2',
}
ALL_WELL = {
    "COMPOSE": "2.20.0",
    "RUNTIMES": '{"habana":{},"nvidia":{},"runc":{}}',
    "DRIVER": "1.24.1-490be32",
    "GPUS": "NVIDIA H200, 9.0",
}


def run_vllm(folder: Path, *missing: str, options: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    for name, does in STAND_INS.items():
        if name not in missing:
            (folder / name).write_text(f"#!/bin/sh\n{does}\n")
            (folder / name).chmod(0o755)
    # Nothing else of this machine, where there may be a real one.
    for name in ("bash", "cat", "dirname", "env", "grep", "head", "sed", "sh", "sort"):
        (folder / name).symlink_to(shutil.which(name) or name)
    given = {"PATH": str(folder), **ALL_WELL, **environ}
    return subprocess.run([SCRIPT, *options.split()], env=given, cwd="/", capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("environ", "device"),
    [({}, "hpu"), ({"LLM_DEVICE": "hpu"}, "hpu"), ({"LLM_DEVICE": "cuda"}, "cuda"), ({"LLM_DEVICE": "cpu"}, "cpu")],
)
def test_the_model_server_alone_is_started(tmp_path: Path, environ: dict[str, str], device: str) -> None:
    done = run_vllm(tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    compose = f"compose --env-file docker/{device}/.env --file docker/{device}/docker-compose.yaml"
    assert done.stdout.splitlines()[0] == f"{compose} up --detach llm-vllm-model-server"


@pytest.mark.parametrize(
    ("environ", "missing", "message"),
    [
        ({"LLM_DEVICE": "tpu"}, [], "LLM_DEVICE must be cpu, hpu or cuda, but it is 'tpu'."),
        ({}, ["docker"], "Docker is not installed"),
        ({"COMPOSE": ""}, [], "Docker has no Compose"),
        ({"COMPOSE": "v2.6.1"}, [], "Docker Compose is v2.6.1, but 2.20 or newer is needed"),
        ({"RUNTIMES": ""}, [], "The Docker engine cannot be reached"),
        ({"RUNTIMES": '{"runc":{}}'}, [], "Docker has no runtime habana"),
        ({}, ["hl-smi"], "hl-smi is missing"),
        ({"DRIVER": "no device"}, [], "hl-smi tells no driver version"),
        ({"DRIVER": "1.22.1-490be32"}, [], "The Gaudi driver is 1.22, but the image is for 1.24"),
        ({"LLM_DEVICE": "cuda"}, ["nvidia-smi"], "nvidia-smi is missing"),
        ({"LLM_DEVICE": "cuda", "RUNTIMES": '{"runc":{}}'}, [], "Docker cannot reach the GPUs"),
        ({"LLM_DEVICE": "cuda", "GPUS": ""}, [], "nvidia-smi shows no GPU"),
        (
            {"LLM_DEVICE": "cuda", "GPUS": "NVIDIA H200, 9.0\nTesla P100, 6.0"},
            [],
            "vLLM needs a GPU of compute capability 7.5 or newer, but Tesla P100 has 6.0",
        ),
        ({"LLM_DEVICE": "cuda", "GPUS": "Quadro, 10.0\nTesla V100, 7.0"}, [], "vLLM needs a GPU"),
    ],
)
def test_what_is_missing_is_told_before_anything_starts(
    tmp_path: Path, environ: dict[str, str], missing: list[str], message: str
) -> None:
    done = run_vllm(tmp_path, *missing, **environ)
    assert done.returncode == 1
    assert "up --detach" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"run_vllm.sh: {message}")


def test_a_card_that_is_too_old_is_told_where_an_older_vllm_is_described(tmp_path: Path) -> None:
    done = run_vllm(tmp_path, LLM_DEVICE="cuda", GPUS="Tesla V100, 7.0")
    (document,) = re.findall(r"docs/[\w-]+\.md", done.stderr)
    assert "## Volta" in (ROOT / document).read_text()


def test_only_the_gpus_that_are_used_are_looked_at(tmp_path: Path) -> None:
    done = run_vllm(tmp_path, LLM_DEVICE="cuda", CUDA_VISIBLE_DEVICES="1,2")
    assert "--id=1,2" in done.stderr


TWO = "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1"


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        (TWO, {"VLLM_TP_SIZE": "8", "VLLM_PP_SIZE": "2"}),
        ("--nnodes=2 --master-addr=10.0.0.1 --node-rank=1", {"VLLM_TP_SIZE": "2"}),
        ("--node-rank 1", {"VLLM_NNODES": "2", "VLLM_MASTER_ADDR": "10.0.0.1", "VLLM_PP_SIZE": "2"}),
        ("", {"VLLM_NNODES": "2", "VLLM_NODE_RANK": "1", "VLLM_MASTER_ADDR": "10.0.0.1", "VLLM_PP_SIZE": "2"}),
        # What vLLM is told there is vLLM's to read.
        (TWO, {"EXTRA_ARGS": "--tensor-parallel-size 2"}),
        (TWO, {"VLLM_CONFIG": "/data/vllm.yaml"}),
    ],
)
def test_one_of_several_machines_is_started_on_its_own_network(
    tmp_path: Path, options: str, environ: dict[str, str]
) -> None:
    done = run_vllm(tmp_path, options=options, LLM_DEVICE="cuda", **environ)
    assert done.returncode == 0, done.stderr
    compose = "compose --env-file docker/cuda/.env --file compose.nodes.yaml"
    assert done.stdout.splitlines()[0] == f"{compose} up --detach llm-vllm-model-server"


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ("--foo 1", {}, "There is no option --foo, but --nnodes, --node-rank and --master-addr"),
        ("--nnodes", {}, "--nnodes needs a value."),
        ("--nnodes two", {}, "--nnodes (VLLM_NNODES) must be a whole number, but it is 'two'."),
        ("--nnodes 0", {}, "--nnodes (VLLM_NNODES) must be 1 or more, but it is 0."),
        ("--nnodes 2 --node-rank -1", {}, "--node-rank (VLLM_NODE_RANK) must be a whole number, but it is '-1'."),
        (
            "--nnodes 2 --node-rank 2",
            {},
            "--node-rank (VLLM_NODE_RANK) must be less than --nnodes, from 0 to 1, but it",
        ),
        ("--node-rank 1", {}, "--node-rank (VLLM_NODE_RANK) must be less than --nnodes, from 0 to 0, but it is 1"),
        ("--nnodes 2", {}, "--nnodes is 2, but --master-addr (VLLM_MASTER_ADDR) is not given"),
        (TWO, {}, "VLLM_TP_SIZE (1) times VLLM_PP_SIZE (1) must be a multiple of --nnodes, but 1 devices"),
        (TWO, {"VLLM_TP_SIZE": "3"}, "VLLM_TP_SIZE (3) times VLLM_PP_SIZE (1) must be a multiple of --nnodes, but 3"),
        (TWO, {"VLLM_PP_SIZE": "all"}, "VLLM_PP_SIZE must be a whole number, but it is 'all'."),
    ],
)
def test_what_is_no_group_of_machines_is_told_before_anything_starts(
    tmp_path: Path, options: str, environ: dict[str, str], message: str
) -> None:
    done = run_vllm(tmp_path, options=options, LLM_DEVICE="cpu", **environ)
    assert done.returncode == 1
    assert "up --detach" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"run_vllm.sh: {message}")

"""The command `gpus`, as a process of its own, with a stand-in for nvidia-smi."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway.commands.gpus import Here, NoAnswer, on_this_machine
from tests.commands.test_cli import command


def stand_in(folder: Path, script: str) -> str:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_all_generations_are_listed_and_this_machines_gpu(tmp_path: Path) -> None:
    stand_in(tmp_path, 'echo "NVIDIA H200, 9.0, 143771"; echo "Tesla K80, 3.7, 11441"')
    done = command("gpus", PATH=f"{tmp_path}:{os.environ['PATH']}")

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["CC", "ARCHITECTURE", "VLLM", "TYPES", "GPUS"]
    assert lines[1].startswith("12.1  Blackwell 2025")
    assert lines[-2] == "This machine: NVIDIA H200, 140.4 GiB, compute capability 9.0; vLLM: current."
    assert lines[-1] == "This machine: Tesla K80, 11.2 GiB, compute capability 3.7; in no list of this command."


def test_one_is_told_with_its_image_and_options() -> None:
    done = command("gpus", "V100")
    assert done.returncode == 0
    assert done.stdout == (
        "7.0  sm_70, Volta, 2017: V100-16GB (15.77 GiB), V100-32GB (31.7 GiB)\n"
        "  vLLM    0.19 is the last\n"
        "  image   vllm/vllm-openai:v0.19.1\n"
        "  types   float16\n"
        "  option  --dtype float16\n"
        "  note    CUDA 13, which vLLM is built with since 0.20, has no Volta. docs/older-gpus.md has how.\n"
    )


def test_the_same_as_json(tmp_path: Path) -> None:
    stand_in(tmp_path, 'echo "NVIDIA GB10, 12.1, [N/A]"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = json.loads(command("gpus", "--json", PATH=path).stdout)
    assert [one["capability"] for one in told["generations"]][:2] == ["12.1", "12.0"]
    assert told["here"] == [{"name": "NVIDIA GB10", "capability": "12.1", "memory_gib": None}]

    (volta,) = json.loads(command("gpus", "7.0", "--json", PATH=path).stdout)["generations"]
    assert volta["dtype"] == "float16"
    assert volta["gpus"][0] == {"name": "V100-16GB", "memory_gib": 15.77}


def test_a_name_that_is_none_is_wrong_usage() -> None:
    done = command("gpus", "H1000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vllm-gateway: Unknown GPU 'H1000': did you mean H100?")


def test_a_driver_that_does_not_run_is_told_beside_the_list(tmp_path: Path) -> None:
    stand_in(tmp_path, 'echo "NVIDIA-SMI has failed because it could not communicate with the driver."; exit 9')
    done = command("gpus", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0
    assert "Hopper" in done.stdout
    assert done.stderr == (
        "vllm-gateway: nvidia-smi shows no GPU (NVIDIA-SMI has failed because it could not communicate with the "
        "driver.): see that NVIDIA's driver runs.\n"
    )


@pytest.mark.parametrize(
    ("line", "here"),
    [
        ("NVIDIA L4, 8.9, 23034", Here("NVIDIA L4", (8, 9), 23034 / 1024)),
        ("Tesla, one with a comma, 7.0, 16384", Here("Tesla, one with a comma", (7, 0), 16.0)),
        ("Old, [N/A], 2048", Here("Old", None, 2.0)),
        ("nothing else", Here("nothing else", None, None)),
    ],
)
def test_what_the_driver_says_is_read(tmp_path: Path, line: str, here: Here) -> None:
    assert on_this_machine(stand_in(tmp_path, f'echo "{line}"')) == [here]


def test_a_driver_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoAnswer, match="nvidia-smi does not answer"):
        on_this_machine(str(tmp_path / "missing"))

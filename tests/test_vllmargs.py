"""From environment variables to vLLM's command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway import vllmargs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"VLLM_DTYPE": "", "EXTRA_ARGS": ""}, []),
        ({"LLM_VLLM_MODEL_REVISION": "main", "SERVED_MODEL_NAME": "name"}, "--revision main --served-model-name name"),
        ({"VLLM_MAX_MODEL_LEN": "4096", "VLLM_DTYPE": "auto"}, "--dtype auto --max-model-len 4096"),
        ({"GPU_MEMORY_UTILIZATION": "0.9", "VLLM_BLOCK_SIZE": "128"}, "--block-size 128 --gpu-memory-utilization 0.9"),
        ({"NUM_GPU": "2"}, "--tensor-parallel-size 2"),
        ({"NUM_GPU": "2", "VLLM_TP_SIZE": "1"}, "--tensor-parallel-size 1"),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "1"}, "--enable-expert-parallel"),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "true"}, "--enable-expert-parallel"),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "0"}, []),
        ({"QUANTIZATION": "awq", "EXTRA_ARGS": "--a 'b c'"}, ["--quantization", "awq", "--a", "b c"]),
    ],
)
def test_options(given: dict[str, str], expected: str | list[str]) -> None:
    assert vllmargs.options(given) == (expected.split() if isinstance(expected, str) else expected)


def test_extra_args_that_no_shell_would_take() -> None:
    with pytest.raises(vllmargs.Wrong, match="EXTRA_ARGS cannot be split as a shell would"):
        vllmargs.options({"EXTRA_ARGS": "'"})


def test_the_environment_has_no_more_than_is_for_vllm() -> None:
    given = {
        "VLLM_DTYPE": "auto",
        "VLLM_ENABLE_EXPERT_PARALLEL": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "CUDA_VISIBLE_DEVICES": "",
        "LLM_VLLM_API_KEY": "key",
        "HUGGING_FACE_HUB_TOKEN": "token",
    }
    found = vllmargs.environment(given)
    assert "VLLM_DTYPE" not in found
    assert "VLLM_ENABLE_EXPERT_PARALLEL" not in found
    assert "CUDA_VISIBLE_DEVICES" not in found
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert found["VLLM_API_KEY"] == "key"
    assert found["HF_TOKEN"] == "token"


def test_a_key_in_extra_args_is_not_logged(container: Container) -> None:
    done = container.serve(**MODEL, EXTRA_ARGS="--api-key secret --api-key=secret --seed 1")
    assert done.stdout == f"{START} --api-key secret --api-key=secret --seed 1\n"
    assert done.stderr == f"Starting: vllm {START} --api-key … --api-key=… --seed 1\n"


def test_a_token_by_its_newer_name_wins() -> None:
    assert vllmargs.environment({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b"})["HF_TOKEN"] == "a"


@pytest.mark.parametrize(
    ("device", "prepared", "expected"),
    [
        ("cpu", False, "--kv-cache-dtype fp8_e5m2"),
        ("cpu", True, ""),
        ("cuda", False, "--quantization fp8 --kv-cache-dtype fp8"),
        ("cuda", True, "--kv-cache-dtype fp8"),
        ("hpu", False, "--quantization inc --kv-cache-dtype fp8_inc"),
    ],
)
def test_fp8(device: str, prepared: bool, expected: str) -> None:
    assert vllmargs.fp8(device, prepared=prepared) == expected.split()


class Container:
    """What is mounted into a model server's container, beside a vLLM that only says how it was started."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._folder = folder
        for source in ("gateway/vllmargs.py", "compose/start.py"):
            target = folder / source.replace("compose/", "")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((ROOT / source).read_bytes())
        vllm = folder / "vllm"
        vllm.write_text("#!/bin/sh\necho $QUANT_CONFIG $HF_TOKEN $*\n")
        vllm.chmod(0o755)

    def file(self, name: str) -> None:
        """An empty one in the data folder."""
        (self.data / name).parent.mkdir(parents=True, exist_ok=True)
        (self.data / name).touch()

    def serve(self, **environ: str) -> subprocess.CompletedProcess[str]:
        """What came of starting it, with nothing but Python."""
        command = [sys.executable, "-E", "-S", str(self._folder / "start.py"), "serve"]
        given = {"PATH": f"{self._folder}:/usr/bin:/bin", "HF_HOME": str(self.data), **environ}
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


MODEL = {"LLM_VLLM_MODEL_NAME": "Org/Name"}
START = "serve Org/Name --host 0.0.0.0 --port 8008"
FP8 = {**MODEL, "IF_FP8_QUANTIZATION": "true"}


def test_a_container_starts_with_nothing_but_python(container: Container) -> None:
    done = container.serve(**MODEL, VLLM_DTYPE="auto", HF_TOKEN="token")
    assert done.stdout == f"token {START} --dtype auto\n"
    assert done.stderr == f"Starting: vllm {START} --dtype auto\n"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME"),
        ({**MODEL, "EXTRA_ARGS": "'"}, "EXTRA_ARGS cannot be split"),
        ({**FP8, "QUANTIZATION": "awq"}, "QUANTIZATION and IF_FP8_QUANTIZATION are two ways of quantizing"),
        ({**FP8, "LLM_DEVICE": "hpu"}, "There are no scales in "),
    ],
)
def test_a_container_says_why_it_cannot_start(container: Container, environ: dict[str, str], message: str) -> None:
    done = container.serve(**environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllm-gateway: {message}")


@pytest.mark.parametrize("word", ["true", "True", "1"])
def test_one_word_turns_fp8_on(container: Container, word: str) -> None:
    done = container.serve(**MODEL, IF_FP8_QUANTIZATION=word, LLM_DEVICE="cpu", EXTRA_ARGS="--kv-cache-dtype fp8_e4m3")
    assert done.stdout == f"{START} --kv-cache-dtype fp8_e5m2 --kv-cache-dtype fp8_e4m3\n"
    assert f"no checkpoint in FP8 at {container.data}/fp8/Name, so that only the cache is in FP8" in done.stderr
    assert container.serve(**MODEL, IF_FP8_QUANTIZATION="false").stdout == f"{START}\n"


@pytest.mark.parametrize(("device", "options"), [("cpu", ""), ("cuda", " --kv-cache-dtype fp8")])
def test_a_prepared_checkpoint_is_served_under_its_models_name(container: Container, device: str, options: str) -> None:
    container.file("fp8/Name/config.json")
    at = f"serve {container.data}/fp8/Name --host 0.0.0.0 --port 8008"
    done = container.serve(**FP8, LLM_DEVICE=device)
    assert done.stdout == f"{at} --served-model-name Org/Name{options}\n"
    named = container.serve(**FP8, LLM_DEVICE=device, SERVED_MODEL_NAME="name")
    assert named.stdout.startswith(f"{at} --served-model-name name")


def test_gaudi_goes_by_the_scales_of_a_calibration(container: Container) -> None:
    options = "--quantization inc --kv-cache-dtype fp8_inc"
    container.file("inc/name/maxabs_measure_g3.json")
    container.file("inc/name/maxabs_quant_g3.json")
    done = container.serve(**FP8, LLM_DEVICE="hpu")
    assert done.stdout == f"{container.data}/inc/name/maxabs_quant_g3.json {START} {options}\n"
    container.file("inc/name/maxabs_quant_g2.json")
    done = container.serve(**FP8, LLM_DEVICE="hpu")
    assert "There are scales for Gaudi 2 and for Gaudi 3" in done.stderr
    done = container.serve(**FP8, LLM_DEVICE="hpu", QUANT_CONFIG="/data/q.json")
    assert done.stdout == f"/data/q.json {START} {options}\n"

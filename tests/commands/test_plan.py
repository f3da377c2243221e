"""The command `plan`, as a process of its own: of folders, and of a hub on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_cli import command
from tests.commands.test_gpus import stand_in
from tests.support import checkpoints as known
from tests.support import model_hub
from tests.support.checkpoints import tensors_of, write_checkpoint
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "llama 8b"
    return str(write_checkpoint(folder, known.LLAMA_8B, tensors_of(known.LLAMA_8B), shards=4))


def test_each_size_is_shown_and_the_smallest_that_fits_is_taken(llama: str) -> None:
    done = command("plan", llama, "--gpu", "A10G", "--gpus", "4", "--max-model-len", "32768")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{llama}: 8.03 billion numbers, bfloat16, up to 131,072 tokens\n"
        "layers: 32 full, 8 KV heads of 128\n"
        "\n"
        "A10G, 22.0 GiB each, of which vLLM takes 0.92; GiB of each GPU:\n"
        "TP  WEIGHTS  OTHER  KV CACHE     LOW..HIGH   TOKENS  REQUESTS OF 32,768\n"
        " 1    14.99   2.02      3.23    1.23..3.73   26,480                0.81  lacks 0.77\n"
        " 2     7.51   3.87      8.86    6.86..9.36  145,200                4.43  fits\n"
        " 4     3.77   3.87     12.60  10.60..13.10  412,944               12.60  fits\n"
        "\n"
        "[wwwwwwwwwwwwwwwwwwwwwwoooooooooookkkkkkkkkkkkkkkkkkkkkkkkkk.....]"
        "  TP 2: w weights, o other, k KV cache, . not vLLM's\n"
        "\n"
        f"vllm serve '{llama}' --tensor-parallel-size 2 --max-model-len 32768 --gpu-memory-utilization 0.92\n"
    )


def test_what_does_not_fit_is_told_in_gib_and_ends_with_1(llama: str) -> None:
    done = command("plan", llama, "--gpu", "24GiB", "--gpus", "1")
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "It does not fit: for one request of 131,072 tokens each GPU lacks 10.93 GiB at TP 1; one of "
    )
    fitting = last.partition("--max-model-len ")[2].rstrip(").")
    assert command("plan", llama, "--gpu", "24GiB", "--gpus", "1", "--max-model-len", fitting).returncode == 0

    tiny = command("plan", llama, "--gpu", "8GiB", "--gpus", "2", "--concurrency", "3", "--max-model-len", "100")
    assert tiny.returncode == 1
    assert "for 3 requests of 100 tokens each GPU lacks " in tiny.stdout
    assert tiny.stdout.endswith("and there is no room for a cache.\n")


def test_the_vllm_options_that_were_given_count_and_are_passed_on(llama: str) -> None:
    given = ["--max-model-len", "8192", "--kv-cache-dtype", "fp8", "--quantization", "fp8", "--dtype", "float16"]
    done = command("plan", llama, "--gpu", "L4", "--gpu-memory-utilization", "0.8", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert " 1     8.49 " in done.stdout
    assert done.stdout.splitlines()[-1].partition("' ")[2] == (
        "--max-model-len 8192 --gpu-memory-utilization 0.8 --dtype float16 --kv-cache-dtype fp8 --quantization fp8"
    )


def test_a_platforms_plans_are_gone_through(llama: str) -> None:
    plans = ["--plans", str(ROOT / "docs" / "ai-core-plans.yaml")]
    done = command("plan", llama, *plans)
    assert done.returncode == 0
    assert "infer2.l: 1 x A10G, 22.0 GiB each\n  It does not fit: " in done.stdout
    assert "infer2.4xl: 4 x A10G, 22.0 GiB each\n  likely fits on 2: 7.51 GiB of weights" in done.stdout
    assert "train2.8xl: 8 x A100-40GB, 39.4 GiB each\n  fits on 1: 14.99 GiB of weights" in done.stdout

    told = json.loads(command("plan", llama, *plans, "--json").stdout)
    assert [(plan["name"], plan["tensor_parallel_size"]) for plan in told["plans"]] == [
        ("infer2.l", None),
        ("infer2.4xl", 2),
        ("train2.8xl", 1),
        ("train2.8xxl", 1),
    ]
    size = told["plans"][2]["sizes"][0]
    assert size["weights_gib"] == 14.99
    assert size["tokens"]["low"] < size["tokens"]["likely"] < size["tokens"]["high"]


def test_without_a_gpu_it_is_this_machines(llama: str, tmp_path: Path) -> None:
    path = f"{tmp_path}:{os.environ['PATH']}"
    stand_in(tmp_path, 'echo "Tesla T4, 7.5, 15360"; echo "Tesla T4, 7.5, 15360"')
    done = command("plan", llama, "--max-model-len", "4096", PATH=path)
    assert done.returncode == 0
    assert "Tesla T4, 14.5 GiB each" in done.stdout
    assert done.stderr == "vllm-gateway: Tesla T4 (7.5) does not run bfloat16: this counts --dtype float16.\n"
    assert "--tensor-parallel-size 2 " in done.stdout

    stand_in(tmp_path, 'echo "NVIDIA GB10, 12.1, [N/A]"')
    done = command("plan", llama, PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not tell the memory of NVIDIA GB10: give it, as --gpu 24GiB." in done.stderr


def test_a_model_of_a_hub_is_planned_at_its_revision(tmp_path: Path) -> None:
    with model_hub.serving() as hub:
        hub.folders["org/model"] = write_checkpoint(tmp_path, known.QWEN3_8B, tensors_of(known.QWEN3_8B), shards=5)
        done = command("plan", "org/model", "--gpu", "H100", "--revision", "main", HF_ENDPOINT=hub.url)
        other = command("plan", "org/model", "--gpu", "H100", "--revision", "v2", HF_ENDPOINT=hub.url)
    assert done.returncode == 0
    assert "\nvllm serve org/model --revision main --max-model-len 40960 " in done.stdout
    assert (other.returncode, other.stdout) == (2, "")
    assert other.stderr.startswith(f"vllm-gateway: org/model on {hub.url} has no revision v2: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "A100"], "A100 means more than one GPU: name one of A100-40GB, A100-80GB."),
        (["--plans", "none.yaml"], "The plans none.yaml cannot be read: No such file or directory."),
        (["--plans", "x", "--gpus", "2"], "--plans says which GPUs there are: leave --gpu and --gpus out."),
        (["--gpu", "H100", "--gpus", "0"], "Invalid value for '--gpus'"),
        (["--gpu", "H100", "--gpu-memory-utilization", "0"], "Invalid value for '--gpu-memory-utilization'"),
    ],
)
def test_what_is_wrong_is_one_sentence(llama: str, arguments: list[str], sentence: str) -> None:
    done = command("plan", llama, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("config", [[], {}, {"num_hidden_layers": 2}, None])
def test_a_config_that_is_none_is_one_sentence(tmp_path: Path, config: object) -> None:
    write_checkpoint(tmp_path, config, tensors_of(known.TINY))
    done = command("plan", str(tmp_path), "--gpu", "H100")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vllm-gateway: config.json ")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_is_not_taken_for_a_model_that_does_not_fit() -> None:
    with model_hub.serving() as hub:
        hub.go_on.clear()
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "plan", "org/model", "--gpu", "H100"],
            env={**os.environ, "HF_ENDPOINT": hub.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert hub.arrived.wait(60)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == (b"", b"")
        finally:
            process.kill()
            hub.go_on.set()
    assert process.returncode == 130


def test_a_server_does_not_import_what_sizes_models_and_sends_files() -> None:
    code = (
        "import contextlib, sys; from gateway.__main__ import main; sys.argv[1:] = ['--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "assert 'gateway.app' in sys.modules\n"
        "sys.exit(any(name.startswith(('gateway.sizing', 'gateway.batch')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_the_documents_show_what_the_commands_say(tmp_path: Path) -> None:
    shown = [block for name in ("models.md", "older-gpus.md") for block in _blocks(ROOT / "docs" / name)]
    assert len(shown) >= 5
    with model_hub.serving() as hub:
        hub.folders["meta-llama/Llama-3.1-8B"] = write_checkpoint(tmp_path, known.LLAMA_8B, tensors_of(known.LLAMA_8B))
        for arguments, output in shown:
            with_root = [str(ROOT / word) if word.startswith("docs/") else word for word in arguments]
            done = command(*with_root, HF_ENDPOINT=hub.url)
            assert done.stdout == output, f"put this into the document:\n{done.stdout}"


def _blocks(document: Path) -> list[tuple[list[str], str]]:
    found = re.findall(r"^```\n\$ vllm-gateway (.*)\n((?:.*\n)*?)```$", document.read_text(), re.MULTILINE)
    return [(arguments.split(), output) for arguments, output in found]

"""FP8, really made and served: the demo model quantized, its scales checked, vLLM asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.config.load import build
from gateway.config.model_server_settings import ModelServerSettings
from gateway.modelserver import install
from gateway.modelserver.vllm_process import DEMO_NAME, ModelServer, launch
from tests.heavy.fp8.conftest import DATASETS, Kit
from tests.support.gateway_process import running
from tests.support.ports import free_port

QUESTION = "What is Deep Learning?"


def quantize(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """As a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", "quantize", *map(str, argv)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def dynamic(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint made without data, and what was said."""
    folder = tmp_path_factory.mktemp("dynamic") / "demo"
    done = quantize(kit.model, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def calibrated(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint made with a dataset, and what was said."""
    folder = tmp_path_factory.mktemp("calibrated") / "demo"
    done = quantize(kit.model, folder, "--dataset", DATASETS / "pandas-1.5.pkl", "--samples", "2", "--length", "64")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def scheme(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = found["config_groups"].values()
    assert found["ignore"] == ["lm_head"]
    assert group["weights"]["type"] == group["input_activations"]["type"] == "float"
    assert group["weights"]["num_bits"] == group["input_activations"]["num_bits"] == 8
    return dict(group["input_activations"])


def test_a_checkpoint_is_made_without_data_and_reported(kit: Kit, dynamic: tuple[Path, str]) -> None:
    folder, said = dynamic
    assert scheme(folder)["dynamic"] is True
    before, after = ((each / "model.safetensors").stat().st_size for each in (kit.model, folder))
    assert f"{folder}: {kit.model} as FP8_DYNAMIC." in said
    assert f"Size: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.0%})." in said
    assert 0.2 < after / before < 0.5
    found = re.search(r"Greedy answers: (\d+) of (\d+) tokens as before \((.*)%\), (\d) of 8 answers", said)
    assert found
    assert 0.95 * int(found[2]) <= int(found[1]) <= int(found[2])
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in folder.iterdir())
    assert [entry.name for entry in folder.parent.iterdir()] == ["demo"]


# What flows into every layer at the same questions, by torch itself; prints the largest of each.
_LARGEST = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1], [json.loads(line) for line in open(sys.argv[2])]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
largest = {}
def watch(name):
    def hook(module, given):
        largest[name] = max(largest.get(name, 0.0), given[0].abs().max().item())
    return hook
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        module.register_forward_pre_hook(watch(name))
for row in rows:
    messages = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
    messages.append({"role": "user", "content": row["question"]})
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        model(given["input_ids"][:, :64])
print(json.dumps(largest))
"""
_SCALES = """
import json, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    names = {name: file.get_tensor(name) for name in file.keys()}
print(json.dumps({name.removesuffix(".input_scale"): float(scale) for name, scale in names.items()
                  if name.endswith(".input_scale")} | {"types": sorted({str(one.dtype) for one in names.values()})}))
"""


def test_a_calibrated_checkpoint_has_the_scales_of_its_dataset(
    kit: Kit, calibrated: tuple[Path, str], tmp_path: Path
) -> None:
    folder, said = calibrated
    assert "Calibrating with 2 questions of" in said
    assert f"{folder}: {kit.model} as FP8." in said
    assert scheme(folder)["dynamic"] is False
    kit.read(DATASETS / "pandas-1.5.pkl", tmp_path, samples=2)
    largest = json.loads(kit.run("-c", _LARGEST, kit.model, tmp_path / "text.jsonl").stdout)
    scales = json.loads(kit.run("-c", _SCALES, folder / "model.safetensors").stdout)
    assert "torch.float8_e4m3fn" in scales.pop("types")
    # 448 is the largest number of eight bits that FP8 (E4M3) has.
    assert scales == {name: pytest.approx(most / 448, rel=1e-3) for name, most in largest.items()}
    assert len(scales) == 3 * 7


def test_a_model_that_fp8_changes_is_reported_as_changed(kit: Kit, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM; "
        "torch.manual_seed(1); config = LlamaConfig.from_pretrained(sys.argv[1]); config.initializer_range = 0.2; "
        "LlamaForCausalLM(config).save_pretrained(sys.argv[2]); "
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    assert kit.run("-c", program, kit.model, tmp_path / "random").returncode == 0
    done = quantize(tmp_path / "random", tmp_path / "made")
    found = re.search(r"Greedy answers: (\d+) of (\d+) tokens", done.stdout)
    assert found
    assert int(found[1]) < 0.9 * int(found[2])


def test_vllm_serves_it_with_the_right_answers_through_the_gateway(dynamic: tuple[Path, str], tmp_path: Path) -> None:
    python = install.ensure_environment(os.environ)
    settings = build(ModelServerSettings, None, port=free_port())
    command = launch(settings, python, str(dynamic[0]), os.environ, demo=True, local=True)
    log = tmp_path / "vllm.log"
    with ModelServer(command, settings.port, log) as server:
        server.wait_ready()
        with running(server.url) as one, one.client(timeout=60) as client:
            until = time.monotonic() + 60
            while client.get("/v1/health_check").status_code != 200:  # its first answers may take a while
                assert time.monotonic() < until, "it is not ready"
            call = {"messages": {"system": "You are kind.", "user": QUESTION}, "max_new_tokens": 60}
            whole = client.post("/v1/chat/completions", json={**call, "streaming": False}).json()
            assert whole["text"].startswith("Deep learning is a branch of machine learning that trains neural networks")
            streamed = client.post("/v1/chat/completions", json={**call, "streaming": True}).text
            assert "neural" in streamed
            openai = {"model": DEMO_NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
            reply = client.post("/v1/chat/completions", json=openai).json()
            assert reply["choices"][0]["message"]["content"] == whole["text"]
    assert "CompressedTensorsW8A8Fp8" in log.read_text()


# As a download that was cut off leaves it.
_WITHOUT_A_LAYER = """
import sys
from safetensors import safe_open
from safetensors.torch import save_file
with safe_open(sys.argv[1], "pt") as file:
    kept = {name: file.get_tensor(name) for name in file.keys() if ".layers.1." not in name}
save_file(kept, sys.argv[1], metadata={"format": "pt"})
"""


def test_what_cannot_be_quantized_is_said_and_nothing_is_left(
    kit: Kit, dynamic: tuple[Path, str], tmp_path: Path
) -> None:
    done = quantize(dynamic[0], tmp_path / "made")
    assert done.returncode == 1
    assert f"vllm-gateway: {dynamic[0]} is quantized already (compressed-tensors)" in done.stderr
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    done = quantize(kit.model, tmp_path / "made", "--dataset", tmp_path / "bad.csv")
    assert done.returncode == 1
    assert "it has no column question and no column system_prompt" in done.stderr
    (tmp_path / "odd").mkdir()
    done = quantize(tmp_path / "odd", tmp_path / "made")
    assert done.returncode == 1
    assert "has no config.json that can be read" in done.stderr
    shutil.copytree(kit.model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    done = quantize(tmp_path / "broken", tmp_path / "made")
    assert done.returncode == 1
    assert f"vllm-gateway: {tmp_path / 'broken'} cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.copytree(kit.model, tmp_path / "partly")
    assert kit.run("-c", _WITHOUT_A_LAYER, tmp_path / "partly" / "model.safetensors").returncode == 0
    done = quantize(tmp_path / "partly", tmp_path / "made")
    assert done.returncode == 1
    assert f"{tmp_path / 'partly'} lacks 9 of its weights, model.layers.1." in done.stderr
    done = quantize(kit.model, tmp_path / "bad.csv" / "made")
    assert done.returncode == 1
    assert "Quantizing" not in done.stdout
    assert f"{tmp_path / 'bad.csv' / 'made'} cannot be written: File exists." in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.csv", "broken", "odd", "partly"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_leaves_nothing(kit: Kit, tmp_path: Path, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "gateway", "quantize", str(kit.model), str(tmp_path / "made")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("Asking it"):
                process.send_signal(number)
                break
        started = time.monotonic()
        assert process.wait(30) == 128 + number
        assert time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())


def test_one_that_finds_its_folder_taken_leaves_it(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = quantize(kit.model, tmp_path / "mine")
    assert done.returncode == 1
    assert done.stderr == f"vllm-gateway: {tmp_path / 'mine'} exists already: remove it, or name another folder.\n"
    assert (tmp_path / "mine").read_text() == "precious"

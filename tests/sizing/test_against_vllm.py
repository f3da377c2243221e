"""The KV cache, counted beside vLLM 0.32's own code, which runs in the model server's Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.modelserver.install import ensure_environment
from gateway.sizing.architecture import read_architecture
from gateway.sizing.kv_cache import cache_of
from tests.support import checkpoints as known
from tests.support.checkpoints import Config

SCRIPT = Path(__file__).with_name("scripts") / "count_kv_cache.py"
SIZE = 20 * 1024**3
NEARLY = 0.002


def of(config: Config, architecture: str, **fields: object) -> Config:
    """A config that vLLM knows the class of."""
    without = {name: value for name, value in config.items() if name not in ("bias", "quantization_config")}
    return {**without, "architectures": [architecture], **fields}


CONFIGS = [
    of(known.LLAMA_8B, "LlamaForCausalLM"),
    of(known.MIXTRAL, "MixtralForCausalLM", model_type="mixtral"),
    of(known.MISTRAL_7B_01, "MistralForCausalLM", model_type="mistral"),
    of(known.QWEN3_8B, "Qwen3ForCausalLM", model_type="qwen3"),
    of(known.DEEPSEEK_V3, "DeepseekV3ForCausalLM", q_lora_rank=1536),
    of(known.GPT_OSS_120B, "GptOssForCausalLM"),
    of(known.GEMMA_2_27B, "Gemma2ForCausalLM"),
    # Kinds of nearly as many layers are padded to the larger.
    of(
        known.GPT_OSS_20B,
        "GptOssForCausalLM",
        num_hidden_layers=25,
        layer_types=["full_attention", "sliding_attention"] * 12 + ["full_attention"],
    ),
]


@pytest.mark.vllm
def test_eight_models_are_counted_as_vllm_itself_counts_them() -> None:
    environ = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    lines = "".join(json.dumps(config) + "\n" for config in CONFIGS)
    python = ensure_environment(environ)
    done = subprocess.run(
        [python, SCRIPT], input=lines, env=environ, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(CONFIGS)
    for config, theirs in zip(CONFIGS, told, strict=True):
        model = read_architecture(config)
        ours = cache_of(model, 1, 2, model.length, theirs["in_flight"])
        assert model.length == theirs["length"], config
        assert ours.tokens(SIZE) == pytest.approx(theirs["tokens"], rel=NEARLY), config
        assert ours.concurrency(SIZE) == pytest.approx(theirs["concurrency"], rel=NEARLY), config

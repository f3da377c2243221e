"""Reads config.json's, one a line, and writes what vLLM's own arithmetic makes of 20 GiB of KV cache for each.

Runs in the model server's Python. The layers are described here, from vLLM's own reading of the config.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

SIZE = 20 * 1024**3


def count(folder: str) -> dict[str, object]:
    """Tokens, concurrency, and the two lengths that they were counted with."""
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16")
    scheduler = SchedulerConfig(
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=model.max_model_len,
        is_encoder_decoder=False,
        async_scheduling=False,
    )
    whole = VllmConfig(model_config=model, cache_config=CacheConfig(block_size=16), scheduler_config=scheduler)
    whole.scheduler_config.async_scheduling = False
    whole.cache_config.kv_cache_layout = "LBNHC"
    text = model.hf_text_config
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    common: dict[str, Any] = {
        "block_size": 16,
        "num_kv_heads": model.get_num_kv_heads(whole.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": torch.bfloat16,
    }
    specs: dict[str, object] = {}
    for layer, kind in enumerate(kinds):
        if model.use_mla:
            spec: object = MLAAttentionSpec(**common)
        elif kind == "sliding_attention":
            spec = SlidingWindowSpec(**common, sliding_window=window)
        else:
            spec = FullAttentionSpec(**common)
        specs[f"layers.{layer}"] = spec
    (made,) = get_kv_cache_configs(whole, [specs], [SIZE])
    tokens, concurrency = get_kv_cache_capacity(whole, made)
    return {
        "tokens": tokens,
        "concurrency": concurrency,
        "in_flight": whole.max_in_flight_tokens,
        "length": model.max_model_len,
    }


def main(out: TextIO) -> None:
    """vLLM's own words go to standard error."""
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(line)
            out.write(json.dumps(count(folder)) + "\n")
            out.flush()


if __name__ == "__main__":
    told, sys.stdout = sys.stdout, sys.stderr
    main(told)

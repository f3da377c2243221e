"""Models as config.json and tensors without a number in them: what is known of public ones, written as sparse files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gateway.sizing.safetensors import Tensor

Config = dict[str, Any]


def llama(**fields: Any) -> Config:
    """Llama-3.1-8B's config, but for `fields`."""
    return {
        "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, **fields,
    }  # fmt: skip


def _shaped(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int) -> Config:
    return llama(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=length,
    )  # fmt: skip


LLAMA_8B = llama()
LLAMA_70B = _shaped(8192, 28672, 80, 64, 8, 128256, 131072)
QWEN25_7B = _shaped(3584, 18944, 28, 28, 4, 152064, 32768) | {"bias": True}
QWEN25_72B = _shaped(8192, 29568, 80, 64, 8, 152064, 32768) | {"bias": True}
QWEN3_8B = _shaped(4096, 12288, 36, 32, 8, 151936, 40960) | {"head_dim": 128}
QWEN3_32B = _shaped(5120, 25600, 64, 64, 8, 151936, 40960) | {"head_dim": 128}
QWEN3_30B_A3B = _shaped(2048, 6144, 48, 32, 4, 151936, 40960) | {
    "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768,
}  # fmt: skip
MIXTRAL = _shaped(4096, 14336, 32, 32, 8, 32000, 32768) | {"num_local_experts": 8}
MISTRAL_7B_01 = _shaped(4096, 14336, 32, 32, 8, 32000, 32768) | {"sliding_window": 4096}
MISTRAL_SMALL = _shaped(5120, 32768, 40, 32, 8, 131072, 131072) | {
    "head_dim": 128, "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
}  # fmt: skip
PHI_4 = _shaped(5120, 17920, 40, 40, 10, 100352, 16384)
GRANITE = _shaped(4096, 12800, 40, 32, 8, 49155, 131072) | {"tie_word_embeddings": True}
CODELLAMA = _shaped(4096, 11008, 32, 32, 32, 32016, 16384)
GEMMA_2_27B = _shaped(4608, 36864, 46, 32, 16, 256000, 8192) | {
    "model_type": "gemma2", "head_dim": 128, "sliding_window": 4096,
}  # fmt: skip
DEEPSEEK_V2_LITE = _shaped(2048, 10944, 27, 16, 16, 102400, 163840) | {
    "model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_V3 = _shaped(7168, 18432, 61, 128, 128, 129280, 163840) | {
    "model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
}  # fmt: skip
GPT_OSS_20B = _shaped(2880, 2880, 24, 64, 8, 201088, 131072) | {
    "model_type": "gpt_oss", "head_dim": 64, "num_local_experts": 32, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B | {
    "num_hidden_layers": 36, "num_local_experts": 128, "layer_types": ["sliding_attention", "full_attention"] * 18,
}  # fmt: skip
TINY = _shaped(64, 128, 2, 4, 2, 512, 4096) | {"tie_word_embeddings": True}


def tensors_of(config: Config, *, linear: str = "BF16") -> list[Tensor]:
    """All tensors of such a model, as its public checkpoint has them; linear layers in the type `linear`."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    top: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", config["model_type"] == "gemma2"):
        top["lm_head.weight"] = (vocab, hidden)
    found = [Tensor(name, "BF16", shape) for name, shape in top.items()]
    for layer in range(config["num_hidden_layers"]):
        shapes = {**_attention(config), **_mlp(config, layer)}
        for name, shape in shapes.items():
            is_linear = (len(shape) == 2 and "proj" in name) or ".w" in name
            is_linear = is_linear and "gate.weight" not in name.replace("gate_proj", "")
            found.append(Tensor(f"model.layers.{layer}.{name}", linear if is_linear else _type(name), shape))
    return found + list(_vision(config))


def _vision(config: Config) -> Iterator[Tensor]:
    if not (told := config.get("vision_config")):
        return
    hidden, inner = told["hidden_size"], told["intermediate_size"]
    for layer in range(told["num_hidden_layers"]):
        prefix = f"vision_tower.transformer.layers.{layer}"
        yield from (Tensor(f"{prefix}.attention.{name}_proj.weight", "BF16", (hidden, hidden)) for name in "qkvo")
        yield from (
            Tensor(f"{prefix}.feed_forward.{name}.weight", "BF16", (inner, hidden)) for name in ("w1", "w2", "w3")
        )
    yield Tensor("multi_modal_projector.patch_merger.merging_layer.weight", "BF16", (hidden, 4 * hidden))
    yield Tensor("multi_modal_projector.linear_1.weight", "BF16", (config["hidden_size"], hidden))
    yield Tensor("multi_modal_projector.linear_2.weight", "BF16", (config["hidden_size"],) * 2)


def _type(name: str) -> str:
    return "U8" if name.endswith(("_blocks", "_scales")) else "BF16"


def _attention(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim", hidden // heads)
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if latent := config.get("kv_lora_rank"):
        rope, nope, value = (config[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        return {
            **norms,
            "self_attn.q_proj.weight": (heads * (nope + rope), hidden),
            "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
            "self_attn.kv_a_layernorm.weight": (latent,),
            "self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
            "self_attn.o_proj.weight": (hidden, heads * value),
        }
    widths = {"q": heads * dim, "k": config["num_key_value_heads"] * dim, "v": config["num_key_value_heads"] * dim}
    shapes = {f"self_attn.{name}_proj.weight": (width, hidden) for name, width in widths.items()}
    biases = {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items() if config.get("bias")}
    return {**norms, **shapes, **biases, "self_attn.o_proj.weight": (hidden, heads * dim)}


def _mlp(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def gated(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, hidden),
            f"{prefix}.up_proj.weight": (width, hidden),
            f"{prefix}.down_proj.weight": (hidden, width),
        }

    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        many = config["num_local_experts"]
        return {
            "mlp.router.weight": (many, hidden),
            "mlp.experts.gate_up_proj_blocks": (many, 2 * inner, hidden // 32, 16),
            "mlp.experts.gate_up_proj_scales": (many, 2 * inner, hidden // 32),
            "mlp.experts.down_proj_blocks": (many, hidden, inner // 32, 16),
            "mlp.experts.down_proj_scales": (many, hidden, inner // 32),
        }
    many = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts", 0)
    if not many or layer < config.get("first_k_dense_replace", 0):
        return gated("mlp", inner)
    width: int = config.get("moe_intermediate_size") or inner
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (many, hidden)}
    for expert in range(many):
        shapes |= gated(f"mlp.experts.{expert}", width)
    if shared := config.get("n_shared_experts"):
        shapes |= gated("mlp.shared_experts", shared * width)
    return shapes


def header_of(tensors: Iterable[Tensor]) -> bytes:
    """A safetensors file up to its first number."""
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        told[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    header = json.dumps(told).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def write_checkpoint(folder: Path, config: object, tensors: list[Tensor], *, shards: int = 1) -> Path:
    """A model's folder, whose weights are holes in its files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = tensors[shard::shards]
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in part), name)
        begin = header_of(part)
        with (folder / name).open("wb") as file:
            file.write(begin)
            file.truncate(len(begin) + sum(tensor.size for tensor in part))
    if shards > 1:
        index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder

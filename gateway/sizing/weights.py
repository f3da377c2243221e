"""Computes the memory of a checkpoint's tensors on each of several GPUs, as vLLM loads them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gateway.sizing.architecture import BYTES, Architecture
from gateway.sizing.safetensors import Tensor

# Each GPU has the whole of these tensors: norms, routers, and the projections into MLA's latent.
_ON_EACH = re.compile(
    r"norm|(?:mlp|moe|feed_forward)\.(?:gate|router)\.|(?:^|\.)router\.|shared_expert_gate"
    r"|e_score_correction_bias|kv_a_proj_with_mqa|q_a_proj|\.sinks$"
)
# Tensors beside the model's own layers: drafting layers, and tables that are computed anew.
_NOT_LOADED = re.compile(r"^mtp\.|\.mtp\.|rotary_emb\.inv_freq$|\.masked_bias$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SEES = re.compile(r"vision|visual|audio|image")
_LINEAR = re.compile(
    r"proj[\w.]*weight$|experts?\..*(?:weight|_proj)$|\.w[123]\.weight$|(?:qkv|dense|fc\d|query_key_value).*weight$"
)
_FLOATS = ("F32", "F16", "BF16")


def weights_of(
    model: Architecture, tensors: Iterable[Tensor], tp: int, dtype: str, length: int, *, to_fp8: bool = False
) -> int:
    """Bytes of the weights on one of `tp` GPUs, with the table of rotary positions.

    A checkpoint without its own quantization is loaded in `dtype`. `to_fp8` means `--quantization fp8`, which makes
    its linear layers one byte per number.
    """
    total = BYTES[dtype] * model.rotary * max(length, model.length)
    names = set()
    for tensor in tensors:
        if tensor.name in names or not _is_loaded(tensor.name, model):
            continue
        names.add(tensor.name)
        total += -(-_bytes(tensor, model, dtype, to_fp8=to_fp8) // _parts(tensor.name, model, tp))
    return total


def parameters_of(model: Architecture, tensors: Iterable[Tensor]) -> int:
    """The count of stored numbers in the loaded tensors; several numbers packed into one count as one."""
    return sum(tensor.numbers for tensor in tensors if _is_loaded(tensor.name, model))


def _is_loaded(name: str, model: Architecture) -> bool:
    if _NOT_LOADED.search(name) or (model.tied and name.endswith("lm_head.weight")):
        return False
    layer = _LAYER.search(name)
    # DeepSeek's checkpoints have drafting layers after the model's last layer.
    return layer is None or int(layer[1]) < model.depth or bool(_SEES.search(name))


def _bytes(tensor: Tensor, model: Architecture, dtype: str, *, to_fp8: bool) -> int:
    if model.quantization or tensor.dtype not in _FLOATS:
        return tensor.size
    if to_fp8 and len(tensor.shape) > 1 and _LINEAR.search(tensor.name) and not _SEES.search(tensor.name):
        return tensor.numbers
    return tensor.numbers * BYTES[dtype]


def _parts(name: str, model: Architecture, tp: int) -> int:
    if _ON_EACH.search(name):
        return 1
    if re.search(r"\.[kv]_proj\.", name) and not _SEES.search(name):
        return min(tp, model.kv_heads)
    return tp

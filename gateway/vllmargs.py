"""From environment variables to vLLM's command line; pure functions, with nothing but Python's own.

For `up`, and for the containers of model servers, where this is mounted beside whatever vLLM the image has.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

# Names that people know from the systems that this replaces, and vLLM's own options.
_OPTIONS = {
    "LLM_VLLM_MODEL_REVISION": "--revision",
    "SERVED_MODEL_NAME": "--served-model-name",
    "VLLM_DTYPE": "--dtype",
    "VLLM_MAX_MODEL_LEN": "--max-model-len",
    "VLLM_MAX_NUM_SEQS": "--max-num-seqs",
    "VLLM_BLOCK_SIZE": "--block-size",
    "GPU_MEMORY_UTILIZATION": "--gpu-memory-utilization",
    "VLLM_TP_SIZE": "--tensor-parallel-size",
    "VLLM_PP_SIZE": "--pipeline-parallel-size",
    "VLLM_CHAT_TEMPLATE": "--chat-template",
    "VLLM_CONFIG": "--config",
    "QUANTIZATION": "--quantization",
}
_EXPERTS = "VLLM_ENABLE_EXPERT_PARALLEL"
_YES, _NO = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}
# vLLM warns of each variable of its own prefix that it does not know.
NOT_VLLMS = frozenset(name for name in (*_OPTIONS, _EXPERTS) if name.startswith("VLLM_"))


class Wrong(Exception):
    """What cannot be started, in a sentence."""


def options(environ: Mapping[str, str]) -> list[str]:
    """vLLM's options for these variables, of which an empty one is none. Raises Wrong for odd EXTRA_ARGS."""
    found = [part for name, option in _OPTIONS.items() if environ.get(name) for part in (option, environ[name])]
    if environ.get("NUM_GPU") and not environ.get("VLLM_TP_SIZE"):
        found += ["--tensor-parallel-size", environ["NUM_GPU"]]
    if is_on(environ, _EXPERTS):
        found.append("--enable-expert-parallel")
    extra = environ.get("EXTRA_ARGS", "")
    try:
        # Last, so that the person's word is the one that counts.
        return found + shlex.split(extra)
    except ValueError as error:
        raise Wrong(f"EXTRA_ARGS cannot be split as a shell would ({error}).") from None


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes. Raises Wrong for another word than those for yes and no."""
    word = environ.get(name, "").lower()
    if word not in _YES | _NO:
        raise Wrong(f"{name} must be true or false, but it is {word!r}.")
    return word in _YES


def fp8(device: str, *, prepared: bool) -> list[str]:
    """What runs a model in FP8 on a device (cpu, hpu or cuda); `prepared` says that its checkpoint is in FP8 already.

    The CPU has no way to quantize while it loads. Gaudi goes by the scales that QUANT_CONFIG leads to.
    """
    if device == "hpu":
        return ["--quantization", "inc", "--kv-cache-dtype", "fp8_inc"]
    if device == "cuda":
        return ([] if prepared else ["--quantization", "fp8"]) + ["--kv-cache-dtype", "fp8"]
    return [] if prepared else ["--kv-cache-dtype", "fp8_e5m2"]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """vLLM's environment: without what is empty or not for it, and with the keys under the names that it reads."""
    found = {name: value for name, value in environ.items() if value and name not in NOT_VLLMS}
    if key := environ.get("LLM_VLLM_API_KEY"):
        found["VLLM_API_KEY"] = key
    if token := environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        found["HF_TOKEN"] = token
    return found

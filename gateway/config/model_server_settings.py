"""The settings of the local vLLM that `up` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr

from gateway.config.environment import EnvironmentSettings


class ModelServerSettings(EnvironmentSettings):
    """Settings of the local vLLM that `up` starts; the names come from the systems that the gateway replaces."""

    port: int = Field(8008, ge=1, le=65535, validation_alias="LLM_VLLM_PORT", description="Port of the model server.")
    model: str | None = Field(
        None,
        validation_alias="LLM_VLLM_MODEL_NAME",
        description="A hub's ORG/NAME or a folder; unset: the demo model.",
    )
    revision: str | None = Field(
        None, validation_alias="LLM_VLLM_MODEL_REVISION", description="A branch, a tag or a commit of it."
    )
    served_name: str | None = Field(
        None, validation_alias="SERVED_MODEL_NAME", description="The name that requests give as `model`."
    )
    python: Path | None = Field(
        None, validation_alias="LLM_VLLM_PYTHON", description="A Python that has a vLLM; unset: an environment of ours."
    )
    cpu_kvcache_space: int | None = Field(
        None, ge=1, validation_alias="VLLM_CPU_KVCACHE_SPACE", description="GiB of memory for the cache on the CPU."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] | None = Field(
        None, validation_alias="VLLM_DTYPE", description="Number format of the model; the demo model's is float32."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("VLLM_MAX_NUM_SEQS", "MAX_CONCURRENT_REQUESTS"),
        description="Most answers at the same time.",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("VLLM_MAX_MODEL_LEN", "MAX_TOKENS"),
        description="Most tokens of a prompt and its answer.",
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, validation_alias="MAX_CONCURRENT_TOKENS", description="Most tokens of one step over all answers."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        validation_alias=AliasChoices("GPU_MEMORY_UTILIZATION", "GPU_MEM_UTILIZATION", "GPU_MEM_ULTIIZATION"),
        description="The part of the GPU's memory that vLLM takes.",
    )
    eager: bool | None = Field(
        None, validation_alias="VLLM_EAGER", description="Start without compiling; unset: the demo model does."
    )
    tp_size: int | None = Field(None, ge=1, validation_alias="VLLM_TP_SIZE", description="Tensor parallel size.")
    pp_size: int | None = Field(None, ge=1, validation_alias="VLLM_PP_SIZE", description="Pipeline parallel size.")
    nnodes: int | None = Field(
        None, ge=1, validation_alias="VLLM_NNODES", description="Machines that a model is split over."
    )
    node_rank: int | None = Field(
        None, ge=0, validation_alias="VLLM_NODE_RANK", description="Which of them this is; `up` starts the first, 0."
    )
    master_addr: str | None = Field(
        None, validation_alias="VLLM_MASTER_ADDR", description="Address of the first of them."
    )
    distributed_executor_backend: str | None = Field(
        None,
        validation_alias="VLLM_DISTRIBUTED_EXECUTOR_BACKEND",
        description="How vLLM runs its workers: `mp`, `ray`, …; unset: as it thinks best.",
    )
    shutdown_timeout: int | None = Field(
        None,
        ge=0,
        validation_alias="VLLM_SHUTDOWN_TIMEOUT",
        description="Seconds that running answers get to end after SIGTERM; unset: none.",
    )
    chat_template: str | None = Field(
        None, validation_alias="VLLM_CHAT_TEMPLATE", description="A chat template's file, for a model without one."
    )
    config: str | None = Field(None, validation_alias="VLLM_CONFIG", description="vLLM's own options in a YAML file.")
    app_config: Path | None = Field(
        None,
        validation_alias="VLLM_APP_CONFIG",
        description="vllm-app's config.json, of which the model counts where none is given.",
    )
    quantization: str | None = Field(
        None, validation_alias="QUANTIZATION", description="How the checkpoint is quantized, if vLLM does not see it."
    )
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        description="Token for the hub's restricted models.",
    )
    extra_args: str = Field("", validation_alias="EXTRA_ARGS", description="More of vLLM's options, as in a shell.")

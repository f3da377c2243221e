"""From environment variables to vLLM's command line."""

from __future__ import annotations

import pytest

from gateway.config import secret_files
from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import CLIENT_KEY, Settings, names_of
from gateway.modelserver import vllm_args


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
        ({"MAX_TOKENS": "4096", "MAX_CONCURRENT_REQUESTS": "128"}, "--max-model-len 4096 --max-num-seqs 128"),
        ({"MAX_CONCURRENT_TOKENS": "4096"}, "--max-num-batched-tokens 4096"),
        ({"GPU_MEM_ULTIIZATION": "0.7"}, "--gpu-memory-utilization 0.7"),
        ({"GPU_MEM_ULTIIZATION": "0.7", "GPU_MEM_UTILIZATION": "0.8"}, "--gpu-memory-utilization 0.8"),
        ({"GPU_MEM_UTILIZATION": "0.8", "GPU_MEMORY_UTILIZATION": "0.9"}, "--gpu-memory-utilization 0.9"),
        ({"GPU_MEM_UTILIZATION": "0.8", "GPU_MEMORY_UTILIZATION": ""}, "--gpu-memory-utilization 0.8"),
        ({"MAX_TOKENS": "1", "VLLM_MAX_MODEL_LEN": "2"}, "--max-model-len 2"),
        ({"MAX_CONCURRENT_REQUESTS": "1", "VLLM_MAX_NUM_SEQS": "2"}, "--max-num-seqs 2"),
        ({"VLLM_EAGER": "1"}, "--enforce-eager"),
        ({"VLLM_EAGER": "0"}, []),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "1"}, "--enable-expert-parallel"),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "true"}, "--enable-expert-parallel"),
        ({"VLLM_ENABLE_EXPERT_PARALLEL": "0"}, []),
        ({"VLLM_SHUTDOWN_TIMEOUT": "20"}, "--shutdown-timeout 20"),
        ({"VLLM_DISTRIBUTED_EXECUTOR_BACKEND": "ray"}, "--distributed-executor-backend ray"),
        (
            {"VLLM_NNODES": "2", "VLLM_NODE_RANK": "0", "VLLM_MASTER_ADDR": "a", "NUM_GPU": "4"},
            "--tensor-parallel-size 4 --nnodes 2 --node-rank 0 --master-addr a",
        ),
        (
            {"VLLM_NNODES": "2", "VLLM_NODE_RANK": "1", "VLLM_MASTER_ADDR": "a", "VLLM_PP_SIZE": "2"},
            "--pipeline-parallel-size 2 --nnodes 2 --node-rank 1 --master-addr a --headless",
        ),
        (
            {"VLLM_NNODES": "2", "VLLM_MASTER_ADDR": "a", "EXTRA_ARGS": "--tensor-parallel-size 2"},
            "--nnodes 2 --master-addr a --tensor-parallel-size 2",
        ),
        ({"QUANTIZATION": "awq", "EXTRA_ARGS": "--a 'b c'"}, ["--quantization", "awq", "--a", "b c"]),
    ],
)
def test_options(given: dict[str, str], expected: str | list[str]) -> None:
    assert vllm_args.options(given) == (expected.split() if isinstance(expected, str) else expected)


def test_extra_args_that_no_shell_would_take() -> None:
    with pytest.raises(vllm_args.OptionError, match="EXTRA_ARGS cannot be split as a shell would"):
        vllm_args.options({"EXTRA_ARGS": "'"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"VLLM_NODE_RANK": "1"}, "VLLM_NODE_RANK must be less than VLLM_NNODES, from 0 to 0, but it is 1"),
        ({"VLLM_NNODES": "2", "VLLM_NODE_RANK": "2"}, "from 0 to 1, but it is 2: count nodes from 0"),
        ({"VLLM_NNODES": "2", "VLLM_TP_SIZE": "2"}, "VLLM_NNODES is 2, but VLLM_MASTER_ADDR is not set"),
        (
            {"VLLM_NNODES": "2", "VLLM_MASTER_ADDR": "a", "NUM_GPU": "3"},
            r"NUM_GPU \(3\) times VLLM_PP_SIZE \(1\) must be a multiple of VLLM_NNODES, but 3 devices",
        ),
        ({"VLLM_NNODES": "none"}, "VLLM_NNODES must be a whole number, 1 or more, but it is 'none'"),
        ({"VLLM_NNODES": "0"}, "VLLM_NNODES must be a whole number, 1 or more, but it is '0'"),
        ({"VLLM_SHUTDOWN_TIMEOUT": "-1"}, "VLLM_SHUTDOWN_TIMEOUT must be a whole number, 0 or more, but it is '-1'"),
    ],
)
def test_nodes_that_can_be_no_group(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(vllm_args.OptionError, match=sentence):
        vllm_args.options(given)


def test_another_word_than_yes_and_no() -> None:
    with pytest.raises(vllm_args.OptionError, match="VLLM_EAGER must be true or false, but it is 'maybe'"):
        vllm_args.options({"VLLM_EAGER": "maybe"})


def test_a_name_that_does_not_count_is_told_where_it_would_say_something_else() -> None:
    same = {"VLLM_MAX_MODEL_LEN": "1", "MAX_TOKENS": "1", "VLLM_MAX_NUM_SEQS": "", "MAX_CONCURRENT_REQUESTS": "1"}
    assert vllm_args.differing(same) == []
    assert vllm_args.differing({"VLLM_MAX_MODEL_LEN": "2", "MAX_TOKENS": "1"}) == [
        "VLLM_MAX_MODEL_LEN and MAX_TOKENS are both set and differ: VLLM_MAX_MODEL_LEN is used."
    ]


def test_up_and_the_containers_go_by_the_same_names() -> None:
    names = {found[0]: found for found in vllm_args._OPTIONS.values()}
    for field in ModelServerSettings.model_fields:
        ours = names_of(field, ModelServerSettings)
        assert names.get(ours[0], ours)[: len(ours)] == ours


def test_the_environment_has_no_more_than_is_for_vllm() -> None:
    given = {
        "VLLM_DTYPE": "auto",
        "VLLM_EAGER": "1",
        "VLLM_APP_CONFIG": "config.json",
        "VLLM_ENABLE_EXPERT_PARALLEL": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "CUDA_VISIBLE_DEVICES": "",
        "LLM_VLLM_API_KEY": "key",
        "HUGGING_FACE_HUB_TOKEN": "token",
    }
    found = vllm_args.vllm_environment(given)
    assert not {"VLLM_DTYPE", "VLLM_EAGER", "VLLM_APP_CONFIG", "VLLM_ENABLE_EXPERT_PARALLEL"} & set(found)
    assert "CUDA_VISIBLE_DEVICES" not in found
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert found["VLLM_API_KEY"] == "key"
    assert found["HF_TOKEN"] == "token"


def test_the_environment_has_nothing_that_is_the_gateways() -> None:
    settings = [name for field in Settings.model_fields for name in names_of(field) if name.startswith("GATEWAY_")]
    files = [f"{name}_FILE" for name in secret_files.NAMES]
    secrets = ["LLM_VLLM_API_KEY", "LLM_VLLM_CLIENT_ID", "LLM_VLLM_CLIENT_SECRET", "LLM_VLLM_TOKEN_URL", CLIENT_KEY]
    headers = [f"OTEL_EXPORTER_OTLP_{kind}HEADERS" for kind in ("", "TRACES_", "METRICS_", "LOGS_")]
    theirs = ["NCCL_DEBUG", "HABANA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "PT_HPU_LAZY_MODE", "HF_TOKEN", "PATH"]
    theirs += ["OTEL_EXPORTER_OTLP_ENDPOINT", "HTTP_PROXY", "VLLM_LOGGING_LEVEL", "OMP_NUM_THREADS"]
    given = dict.fromkeys((*settings, *files, *secrets, *headers, *theirs), "x")
    assert sorted(vllm_args.vllm_environment(given)) == sorted([*theirs, "VLLM_API_KEY"])


def test_a_token_by_its_newer_name_wins() -> None:
    assert vllm_args.vllm_environment({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b"})["HF_TOKEN"] == "a"


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
    assert vllm_args.fp8(device, prepared=prepared) == expected.split()

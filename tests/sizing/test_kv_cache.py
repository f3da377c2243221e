"""Tokens of a KV cache, against what vLLM logged in public runs and what its own code says."""

from __future__ import annotations

import pytest

from gateway.sizing.architecture import read_architecture
from gateway.sizing.kv_cache import BLOCK, bytes_per_token, cache_of, longest
from tests.support import checkpoints as known
from tests.support.checkpoints import Config

GIB = 1024**3
# One step of vLLM's default for H100.
IN_FLIGHT = 8192
MOST = 1 << 24


@pytest.mark.parametrize(
    ("config", "length", "tokens", "concurrency"),
    [
        (known.LLAMA_8B, 131072, 163_840, 1.25),
        (known.MIXTRAL, 32768, 163_840, 5.00),
        (known.MISTRAL_7B_01, 32768, 436_338, 13.32),
        (known.DEEPSEEK_V3, 163840, 305_584, 1.87),
        (known.GPT_OSS_120B, 131072, 547_695, 4.18),
        (known.QWEN25_7B, 32768, 374_480, 11.43),
    ],
)
def test_20_gib_are_counted_as_vllm_0_32_does(config: Config, length: int, tokens: int, concurrency: float) -> None:
    cache = cache_of(read_architecture(config), 1, 2, length, IN_FLIGHT)
    assert cache.tokens(20 * GIB) == pytest.approx(tokens, rel=0.002)
    assert round(cache.concurrency(20 * GIB), 2) == concurrency


@pytest.mark.parametrize(
    ("config", "tp", "width", "size", "logged"),
    [
        (known.LLAMA_8B, 1, 2, 3.81, 31_232),  # RTX 3090
        (known.LLAMA_8B, 1, 2, 2.89, 23_648),
        (known.QWEN3_30B_A3B, 1, 1, 10.55, 230_528),
        (known.MISTRAL_SMALL, 2, 2, 16.20, 212_352),
        (known.LLAMA_70B, 1, 2, 6.743, 22_096),
        (known.QWEN3_8B, 1, 2, 50.32, 366_400),
        (known.QWEN3_32B, 2, 2, 33.66, 275_760),
        (known.LLAMA_70B, 4, 2, 32.06, 420_208),
        # The study of vLLM 0.19 on H100; what it has of hybrids is of an older way of counting.
        (known.LLAMA_8B, 1, 2, 58.11, 476_016),
        (known.LLAMA_8B, 1, 1, 58.11, 952_032),
        (known.LLAMA_8B, 1, 2, 64.61, 529_248),
        (known.LLAMA_8B, 2, 2, 63.76, 1_044_688),
        (known.LLAMA_8B, 4, 2, 67.44, 2_209_792),
        (known.LLAMA_70B, 2, 2, 37.28, 244_304),
        (known.LLAMA_70B, 4, 2, 54.09, 708_992),
        (known.MIXTRAL, 2, 2, 28.44, 465_936),
        (known.DEEPSEEK_V2_LITE, 1, 2, 43.61, 1_505_552),
        (known.QWEN25_7B, 1, 2, 58.53, 1_096_000),
        (known.QWEN25_7B, 2, 2, 63.84, 2_390_592),
        (known.QWEN25_7B, 4, 2, 67.34, 5_043_280),
        (known.QWEN25_72B, 2, 2, 3.04, 19_920),
        (known.QWEN3_8B, 1, 2, 57.50, 418_688),
        (known.QWEN3_30B_A3B, 1, 2, 15.41, 168_288),
        (known.MISTRAL_SMALL, 1, 2, 28.19, 184_752),
        (known.PHI_4, 1, 2, 46.08, 241_568),
        (known.GRANITE, 1, 2, 58.66, 384_432),
        (known.CODELLAMA, 1, 2, 61.66, 126_256),
    ],
)
def test_what_vllm_logged_comes_out(config: Config, tp: int, width: int, size: float, logged: int) -> None:
    cache = cache_of(read_architecture(config), tp, width, 8192, IN_FLIGHT)
    assert cache.tokens(size * GIB) == pytest.approx(logged, rel=0.002)


def test_a_request_needs_what_vllm_said_that_it_needs() -> None:
    # The runs that did not start: "To serve at least one request … (X GiB KV cache is needed".
    qwen = cache_of(read_architecture(known.QWEN3_30B_A3B), 1, 1, 221_000, IN_FLIGHT)
    assert round(qwen.blocks * qwen.block_bytes / GIB, 2) == 10.12
    deepseek = cache_of(read_architecture(known.DEEPSEEK_V2_LITE), 1, 2, 32768, IN_FLIGHT)
    assert round(deepseek.blocks * deepseek.block_bytes / GIB, 2) == 0.95


def test_key_value_heads_are_on_each_gpu_where_there_are_fewer_than_gpus() -> None:
    model = read_architecture(known.QWEN25_7B)
    assert [bytes_per_token(model, tp, 2) for tp in (1, 2, 4, 28)] == [2048, 1024, 512, 512]
    latent = read_architecture(known.DEEPSEEK_V3)
    assert [bytes_per_token(latent, tp, 2) for tp in (1, 8)] == [1152, 1152]


@pytest.mark.parametrize("config", [known.LLAMA_8B, known.GPT_OSS_20B, known.MISTRAL_7B_01, known.DEEPSEEK_V3])
@pytest.mark.parametrize("size", [0, GIB // 1000, GIB, 3 * GIB + 1])
def test_the_longest_request_is_the_longest_that_fits(config: Config, size: int) -> None:
    model = read_architecture(config)
    found = longest(model, 1, 2, IN_FLIGHT, size, MOST)
    assert found == 0 or cache_of(model, 1, 2, found, IN_FLIGHT).request_bytes <= size
    # Where all layers have a window, any length may fit.
    assert found == MOST or cache_of(model, 1, 2, found + BLOCK, IN_FLIGHT).request_bytes > size

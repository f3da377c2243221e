"""The list of GPUs, and what a name or a capability of it means."""

from __future__ import annotations

import pytest

from gateway.sizing.gpus import CURRENT, GENERATIONS, OLDEST_BFLOAT16, OLDEST_CURRENT, UnknownGpu, find, of_capability


@pytest.mark.parametrize(
    ("wanted", "capability", "names"),
    [
        ("8.9", (8, 9), []),
        ("sm_90", (9, 0), []),
        ("sm120", (12, 0), []),
        ("9.0a", (9, 0), []),  # Hopper's own features; Thor is 11.0
        ("L4", (8, 9), ["L4"]),
        ("NVIDIA A10G", (8, 6), ["A10G"]),
        ("a10", (8, 6), ["A10"]),
        ("A100", (8, 0), ["A100-40GB", "A100-80GB"]),
        ("Tesla V100 32GB", (7, 0), ["V100-32GB"]),
        ("GeForce RTX 3060", (8, 6), ["RTX 30xx"]),
        ("RTX 4070 Ti SUPER", (8, 9), ["RTX 40xx"]),
        ("GTX 980", (5, 2), ["GTX 9xx"]),
        ("gtx1080ti", (6, 1), ["GTX 1080 Ti"]),
        ("rtx 4090", (8, 9), ["RTX 4090"]),
    ],
)
def test_a_name_or_a_capability_is_found(wanted: str, capability: tuple[int, int], names: list[str]) -> None:
    found = find(wanted)
    assert {generation.capability for generation, _ in found} == {capability}
    assert [gpu.name for _, gpu in found if gpu] == names


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("H1000", "Unknown GPU 'H1000': did you mean H100?"),
        ("MI300X", "Unknown GPU 'MI300X': "),
        ("", "Unknown GPU ''"),
        ("l", "Unknown GPU 'l'"),
        ("9.5", "No GPU of the list has the compute capability 9.5: those known are 12.1, 12.0, "),
    ],
)
def test_what_is_no_gpu_is_told(wanted: str, sentence: str) -> None:
    with pytest.raises(UnknownGpu) as caught:
        find(wanted)
    assert str(caught.value).startswith(sentence)


def test_the_list_is_of_one_piece() -> None:
    capabilities = [one.capability for one in GENERATIONS]
    assert capabilities == sorted(set(capabilities), reverse=True)
    names = [gpu.name for one in GENERATIONS for gpu in one.gpus]
    assert len(names) == len(set(names))
    for one in GENERATIONS:
        assert (one.vllm == CURRENT) == (one.capability >= OLDEST_CURRENT)
        assert ("bfloat16" in one.types) == (one.capability >= OLDEST_BFLOAT16)
        assert (one.image is None) == (one.vllm == "none") == (not one.types)
        # Where bfloat16, which most checkpoints are, does not run, it says which option does.
        assert (one.dtype is not None) == (one.types in ("float16", "float32"))
        assert of_capability(one.capability) is one

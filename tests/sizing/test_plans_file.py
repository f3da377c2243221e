"""GPUs as they are named on the command line, and a platform's plans in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.sizing.plans_file import BadPlans, card_of, read_plans
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("wanted", "name", "memory"),
    [
        ("24GiB", "any GPU", 24.0),
        ("23.6 gb", "any GPU", 23.6),
        ("A10G", "A10G", 22.0),
        ("h100", "H100", 79.19),
    ],
)
def test_a_gpu_is_a_name_or_its_memory(wanted: str, name: str, memory: float) -> None:
    card = card_of(wanted)
    assert (card.name, card.memory) == (name, memory)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("A100", "A100 means more than one GPU: name one of A100-40GB, A100-80GB."),
        ("8.9", "8.9 means more than one GPU: name one of L4, L40, "),
        ("RTX 3060", "RTX 3060 has cards of several sizes: give the memory, as 24GiB, in place of the name."),
        ("24", "Unknown GPU '24'"),
        ("0GiB", "Unknown GPU '0GiB'"),
        ("MI300", "Unknown GPU 'MI300'"),
    ],
)
def test_a_gpu_that_is_none_is_told(wanted: str, sentence: str) -> None:
    with pytest.raises(BadPlans) as caught:
        card_of(wanted)
    assert str(caught.value).startswith(sentence)


def test_the_example_has_ai_cores_plans() -> None:
    plans = read_plans(ROOT / "docs" / "ai-core-plans.yaml")
    assert [(plan.name, plan.card.name, plan.gpus) for plan in plans] == [
        ("infer2.l", "A10G", 1),
        ("infer2.4xl", "A10G", 4),
        ("train2.8xl", "A100-40GB", 8),
        ("train2.8xxl", "A100-40GB", 8),
    ]


def test_a_plan_may_say_its_gpus_memory(tmp_path: Path) -> None:
    file = tmp_path / "plans.yaml"
    file.write_text('---\n# ours\n- name: "half"   # of one\n  gpu: RTX 3060\n  count: 2\n  memory: 11.6GiB\n\n')
    ((name, card, gpus),) = read_plans(file)
    assert (name, card.memory, gpus) == ("half", 11.6, 2)
    assert card.generation is not None
    assert card.generation.capability == (8, 6)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "{file} has no plan: a plan is"),
        ("plans:\n", "{file}, line 1: a plan is"),
        ("gpu: A10G\n", "{file}, line 1: a plan is"),
        ("- name: a\n  gpu: A10G\n  gpu: T4\n", "{file}, line 3: a plan is"),
        ("- name: a\n- gpu: T4\n", "{file}, the plan a: a plan is"),
        ("- name: a\n  gpu: A10G\n  count: 1\n  disk: 1\n", "{file}, the plan a: a plan is"),
        (
            "- name: a\n  gpu: A10G\n  count: none\n",
            "{file}, the plan a: count must be a number from 1 to 1024, not 'none'",
        ),
        (
            "- name: a\n  gpu: A10\n  count: 1\n  memory: big\n",
            "{file}, the plan a: memory must be as 24GiB, not 'big'",
        ),
        ("- name: a\n  gpu: A11\n  count: 1\n", "{file}, the plan a: Unknown GPU 'A11': did you mean A1"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_its_line_or_plan(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "plans.yaml"
    file.write_text(text)
    with pytest.raises(BadPlans) as caught:
        read_plans(file)
    assert str(caught.value).startswith(sentence.format(file=file))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadPlans, match="cannot be read: No such file"):
        read_plans(tmp_path / "none.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(BadPlans, match="it is not UTF-8"):
        read_plans(tmp_path / "bytes")

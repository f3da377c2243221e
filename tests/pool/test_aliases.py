"""Other names of models: how they are written, and which model a call is for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pool.aliases import Alias, Weights, as_words, from_words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fast=org/name", {"fast": {"org/name": 1}}),
        ("fast=a:9,b:1,*=c", {"fast": {"a": 9, "b": 1}, "*": {"c": 1}}),
        ("fast=llama3:8b", {"fast": {"llama3:8b": 1}}),
        ("fast=qwen:7:2", {"fast": {"qwen:7": 2}}),
        ("fast=qwen:7:1,b", {"fast": {"qwen:7": 1, "b": 1}}),
        ("demo=demo:0.5,new:2.5", {"demo": {"demo": 0.5, "new": 2.5}}),
    ],
)
def test_a_name_has_models_by_their_weights(text: str, found: dict[str, Weights]) -> None:
    assert from_words(text.split(",")) == found
    assert from_words(as_words(found).split(",")) == found


@pytest.mark.parametrize("text", ["a", "=a", "a=", "a=b,", "a=b,b", "a=b,a=c", "a=b=c", "a=b:0", "a=:5", "a=b,=c"])
def test_what_is_no_name_of_a_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^NAME=MODEL"):
        from_words(text.split(","))


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50), min_size=1))
def test_each_model_has_its_part_and_no_run_of_calls_is_one_models(weights: dict[str, int]) -> None:
    alias, total = Alias("name", dict(weights)), sum(weights.values())
    counted: Counter[str] = Counter()
    for calls in range(1, 2 * total + 1):
        counted[alias.choose("abcd")] += 1
        assert all(abs(counted[model] - calls * weight / total) <= len(weights) for model, weight in weights.items())
    assert counted == {model: 2 * weight for model, weight in weights.items()}


def test_a_model_that_is_not_served_has_no_part() -> None:
    alias = Alias("name", {"a": 9, "b": 1})
    assert {alias.choose("b") for _ in range(20)} == {"b"}
    assert {alias.choose(()) for _ in range(20)} == {"a"}  # for an upstream to judge
    assert Counter(alias.choose("ab") for _ in range(10)) == {"a": 9, "b": 1}
    assert (alias.first("b"), alias.first(()), alias.is_served("b"), alias.is_served("c")) == ("b", "a", True, False)

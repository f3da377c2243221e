"""Where a prompt's beginning leads: keys of any bytes, and the order of upstreams that each has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import orjson
from hypothesis import given
from hypothesis import strategies as st

from gateway.pool.prefixes import HOT, NEW, Places, PrefixCounts

EIGHT = [(f"http://10.0.0.{number}:8000", 1.0) for number in range(8)]


def chat(text: str, **before: object) -> bytes:
    return orjson.dumps({**before, "messages": [{"role": "user", "content": text}]})


def key(body: bytes, model: str = "m", salt: str | None = None) -> int | None:
    """Of a prompt that nobody has asked for before."""
    return PrefixCounts().key_of(model, salt, body, 8)


@given(
    bodies=st.lists(
        st.builds(lambda piece, times: piece * times, st.binary(max_size=300), st.sampled_from([1, 3, 100])),
        min_size=1,
        max_size=20,
    ),
    model=st.text(max_size=5),
    salt=st.none() | st.text(max_size=5),
    upstreams=st.integers(1, 70),
)
def test_any_bytes_have_a_key_or_none_and_any_key_an_order(
    bodies: list[bytes], model: str, salt: str | None, upstreams: int
) -> None:
    counts, places = PrefixCounts(), Places([(f"http://v{number}", 1.0) for number in range(upstreams)])
    for body in bodies:
        found = counts.key_of(model, salt, body, upstreams)
        assert found is None or found == HOT or 0 <= found % NEW < 2**32
        if found is not None:
            order = places.of(found)
            assert len(order) == len(set(order)) == min(8, upstreams)
            assert set(order) <= set(range(upstreams))


def test_a_model_and_a_salt_of_lone_surrogates_have_keys_too() -> None:
    assert key(chat("x" * 300), "\ud800", "\udfff") is not None


def test_what_stands_before_the_prompt_is_none_of_it() -> None:
    text = "a long document " * 100
    assert key(chat(text)) == key(chat(text, model="other spelling", temperature=0.5, tools=[])) is not None
    for name in ("prompt", "input"):
        bodies = [orjson.dumps({**before, name: text}) for before in ({}, {"n": 1})]
        assert key(bodies[0]) == key(bodies[1]) is not None


def test_what_is_far_into_a_body_is_not_looked_for() -> None:
    assert key(b" " * 5000 + chat("x" * 500)) == key(b" " * 6000 + chat("y" * 500))


def test_the_model_and_the_salt_are_part_of_a_key() -> None:
    body = chat("x" * 500)
    assert len({key(body), key(body, "n"), key(body, "m", "salt"), key(body, "m", "other")}) == 4


def test_a_short_prompt_has_no_key() -> None:
    assert key(chat("x" * 150)) is None
    assert key(b"") is None


def test_a_beginning_that_many_share_is_no_key_but_what_follows_it_is() -> None:
    """As where a template of three kilobytes stands before each document."""
    counts, template = PrefixCounts(), "Answer from these documents alone. " * 90
    bodies = [chat(template + f"document {number} " * 200) for number in range(40)]
    keys = {counts.key_of("m", None, bodies[number % 40], 8) for number in range(800)}
    assert HOT not in keys
    assert None not in keys
    late = [counts.key_of("m", None, body, 8) for body in bodies]
    assert len(set(late)) == 40
    # The same in any gateway that has seen as much.
    other = PrefixCounts()
    for number in range(840):
        other.key_of("m", None, bodies[-number % 40], 8)
    assert [other.key_of("m", None, body, 8) for body in bodies] == late


def test_a_prompt_of_which_all_is_popular_is_hot_and_cools_down() -> None:
    counts, body = PrefixCounts(), chat("one for all " * 100)
    keys = [counts.key_of("m", None, body, 8) for _ in range(1000)]
    assert HOT not in keys[:8]
    assert keys[200:] == [HOT] * 800
    for number in range(20_000):
        counts.key_of("m", None, chat(f"{number} " * 100), 8)
    assert counts.key_of("m", None, body, 8) not in (HOT, None)


def test_a_model_that_few_serve_has_what_is_popular_sooner() -> None:
    """A quarter of an upstream's share: one in eight calls where two serve it, and one in 32 where eight do."""
    for upstreams, hot in ((2, False), (8, True)):
        counts = PrefixCounts()
        shared = [chat("shared " * 100)] * 1 + [chat(f"{number} " * 200) for number in range(15)]
        for _ in range(40):
            found = [counts.key_of("m", None, body, upstreams) for body in shared]
        assert (found[0] == HOT) is hot


def test_a_call_adds_one_count_at_most_and_two_generations_are_kept() -> None:
    counts = PrefixCounts()
    for number in range(45_000):
        before = len(counts._young)
        counts.key_of("m", None, chat(f"{number} " * (60 + number % 3000 // 10)), 8)
        assert len(counts._young) - before <= (1 if before else 2)  # and the model's own
    assert len(counts._young) + len(counts._old) <= 20_002


def test_each_upstream_has_its_part_of_the_keys() -> None:
    places = Places(EIGHT)
    first = Counter(places.of(number)[0] for number in range(8191))
    assert all(0.9 < count * 8 / 8191 < 1.1 for count in first.values())
    second = Counter(places.of(number)[1] for number in range(8191))
    assert all(0.9 < count * 8 / 8191 < 1.1 for count in second.values())


def test_an_upstream_has_as_many_keys_as_its_weight_says() -> None:
    places = Places([("http://a", 1.0), ("http://b", 3.0), ("http://c", 0.5)])
    first = Counter(places.of(number)[0] for number in range(8191))
    assert [round(first[number] * 4.5 / 8191, 1) for number in range(3)] == [1.0, 3.0, 0.5]


def test_where_one_leaves_its_keys_move_and_no_others() -> None:
    eight, seven = Places(EIGHT), Places(EIGHT[:-1])
    for number in range(8191):
        order = [one for one in eight.of(number) if one != 7]
        assert list(seven.of(number)) == order


def test_another_process_with_the_upstreams_in_another_order_finds_the_same() -> None:
    script = """
import orjson, sys
from gateway.pool.prefixes import Places, PrefixCounts
upstreams = [(address, weight) for address, weight in orjson.loads(sys.argv[1])]
counts, places = PrefixCounts(), Places(upstreams)
bodies = [orjson.dumps({"messages": [{"role": "user", "content": f"{number} " * 300}]}) for number in range(300)]
keys = [counts.key_of("m", "salt", body, len(upstreams)) for body in bodies]
print(orjson.dumps([[upstreams[one][0] for one in places.of(key)] for key in keys]).decode())
"""
    said = set()
    for seed, order in (("1", EIGHT), ("2", EIGHT[::-1]), ("random", EIGHT[3:] + EIGHT[:3])):
        found = subprocess.run(
            [sys.executable, "-c", script, orjson.dumps(order).decode()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        )
        said.add(found.stdout)
    assert len(said) == 1

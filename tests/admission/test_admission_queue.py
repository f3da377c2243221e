"""Who waits has its turn, whoever else waits, and a place that is free costs one look, however many wait."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.keys import Key
from gateway.admission.owners import Owner

A, B, C = Key("a"), Key("b"), Key("c")


class Call:
    """One that waits; `room` is shared by all of a group."""

    def __init__(self, queue: AdmissionQueue[Call], room: list[int], key: Owner = A) -> None:
        self.queue = queue
        self.room = room
        self.key = key
        self.looks = 0
        self.gave_way = False
        self.ends_at_once = False

    def try_admit(self) -> bool:
        self.looks += 1
        if not self.room[0]:
            return False
        self.room[0] -= 1
        self.queue.leave(self)
        if self.ends_at_once:
            self.room[0] += 1
            self.queue.wake()
        return True

    def give_way(self) -> None:
        self.gave_way = True
        self.queue.leave(self)


def waiting(queue: AdmissionQueue[Call], room: list[int], count: int, key: Owner = A) -> list[Call]:
    calls = [Call(queue, room, key) for _ in range(count)]
    assert all(queue.add(call, id(room), key) for call in calls)
    return calls


def admitted(queue: AdmissionQueue[Call], room: list[int], count: int) -> list[Owner]:
    """Whose calls get in as so many places become free."""
    keys = []
    for _ in range(count):
        room[0] += 1
        before = list(queue)
        queue.wake()
        keys += [call.key for call in before if call not in queue]
    return keys


def test_keys_have_turns_and_within_one_the_first_goes_first() -> None:
    queue, room = AdmissionQueue[Call](100), [0]
    first = waiting(queue, room, 3, A)
    waiting(queue, room, 2, B)
    waiting(queue, room, 1, C)
    assert admitted(queue, room, 6) == [A, B, C, A, B, A]
    assert [call.looks for call in first] == [1, 1, 1]
    assert not queue


def test_a_free_place_costs_one_look_whatever_waits() -> None:
    queue, room = AdmissionQueue[Call](10_000), [0]
    calls = waiting(queue, room, 5000, A) + waiting(queue, room, 5000, B)
    queue.wake()  # there is no room
    assert sum(call.looks for call in calls) == 1
    admitted(queue, room, 10)
    assert sum(call.looks for call in calls) == 11


def test_a_group_without_room_does_not_hold_up_another() -> None:
    queue, full, free = AdmissionQueue[Call](10), [0], [0]
    waiting(queue, full, 3, A)
    (other,) = waiting(queue, free, 1, A)
    free[0] = 1
    queue.wake()
    assert other not in queue
    assert len(queue) == 3


def test_who_has_most_in_a_full_queue_gives_way_to_who_has_less() -> None:
    queue, room = AdmissionQueue[Call](4), [0]
    hog = waiting(queue, room, 4, A)
    assert not queue.add(Call(queue, room, A), id(room), A)
    waiting(queue, room, 1, B)
    assert [call.gave_way for call in hog] == [False, False, False, True]
    waiting(queue, room, 1, B)
    assert not queue.add(Call(queue, room, B), id(room), B)  # now they have as many
    waiting(queue, room, 1, C)
    assert Counter(call.key for call in queue) in ({A: 1, B: 2, C: 1}, {A: 2, B: 1, C: 1})


def test_a_key_waits_and_runs_no_more_than_it_may() -> None:
    queue, room = AdmissionQueue[Call](10), [0]
    few = Key("few", max_in_flight=1, max_waiting=2)
    waiting(queue, room, 2, few)
    assert not queue.add(Call(queue, room, few), id(room), few)
    waiting(queue, room, 1, A)
    few.in_flight = 1
    assert admitted(queue, room, 2) == [A]
    few.in_flight = 0
    queue.wake()
    assert len(queue) == 1


def test_calls_that_end_as_soon_as_they_are_let_in_are_no_deep_recursion() -> None:
    queue, room = AdmissionQueue[Call](5000), [1]
    for call in waiting(queue, room, 5000):
        call.ends_at_once = True
    queue.wake()
    assert not queue


def test_all_that_there_is_room_for_go_on() -> None:
    queue, room = AdmissionQueue[Call](10), [0]
    waiting(queue, room, 6, A)
    room[0] = 4
    queue.wake_all()
    assert (len(queue), room) == (2, [0])
    queue.wake_all()
    assert len(queue) == 2


@given(st.lists(st.tuples(st.sampled_from("abc+-!"), st.sampled_from([Owner(), A, B, C]), st.integers(0, 1))))
def test_whatever_happens_nobody_is_forgotten_or_counted_twice(steps: list[tuple[str, Owner, int]]) -> None:
    queue, rooms = AdmissionQueue[Call](5), ([0], [0])
    for step, key, which in steps:
        room = rooms[which]
        if step in "abc":
            queue.add(Call(queue, room, key), which, key)
        elif step == "+":
            room[0] += 1
            queue.wake()
        elif step == "-" and queue:
            queue.leave(next(reversed(queue)))
        elif step == "!":
            queue.wake_all()
        assert len(queue) <= 5
        assert Counter(call.key for call in queue) == queue._waiting
        assert sum(len(line) for lines in queue._groups.values() for line in lines.values()) == len(queue)
    for room in rooms:
        room[0] += 5
    queue.wake_all()
    assert not queue
    assert not queue._groups
    assert not queue._waiting


@pytest.mark.parametrize("count", [1, 3])
def test_without_keys_the_first_goes_first(count: int) -> None:
    queue, room = AdmissionQueue[Call](10), [0]
    calls = waiting(queue, room, count)
    for call in calls:
        room[0] = 1
        queue.wake()
        assert call not in queue

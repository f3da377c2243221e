"""Work that takes long: one step at a time, by turns of those whose it is, and with rests between."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.admission.owners import Owner
from gateway.admission.work_in_steps import WorkInSteps
from tests.support.recorders import FakeClock

STEP = 0.25


class Bench:
    """A clock that moves as steps take time, and what was done when."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.work = WorkInSteps(self.clock.call_later, self.clock.time)
        self.done: list[tuple[str, float]] = []
        self._began = self.clock.now

    def steps(self, name: str, count: int) -> Iterator[None]:
        for number in range(count):
            self.done.append((name, self.clock.now - self._began))
            self.clock.now += STEP
            if number < count - 1:
                yield

    @property
    def names(self) -> str:
        return "".join(name for name, _ in self.done)


def test_a_step_is_followed_by_a_rest_twice_as_long() -> None:
    bench = Bench()
    bench.work.add(Owner(), bench.steps("a", 3))
    assert not bench.done, "not at once, as its caller has more to do"
    bench.clock.advance(10)
    assert bench.done == [("a", 0.0), ("a", 3 * STEP), ("a", 6 * STEP)]


def test_what_comes_after_the_last_step_waits_for_its_rest() -> None:
    bench, owner = Bench(), Owner()
    bench.work.add(owner, bench.steps("a", 1))
    bench.clock.advance(STEP)
    bench.work.add(owner, bench.steps("b", 1))
    bench.clock.advance(10)
    assert bench.done == [("a", 0.0), ("b", 3 * STEP)]
    bench.work.add(owner, bench.steps("c", 1))
    assert bench.clock.timers
    bench.clock.advance(0)
    assert bench.names == "abc"


def test_a_step_that_fails_is_the_end_of_its_work_alone() -> None:
    bench, owner = Bench(), Owner()

    def fails() -> Iterator[None]:
        yield
        raise ZeroDivisionError

    bench.work.add(owner, fails())
    bench.work.add(owner, bench.steps("a", 2))
    bench.clock.advance(10)
    bench.work.add(owner, bench.steps("b", 1))
    bench.clock.advance(10)
    assert bench.names == "aab"


def test_owners_have_turns_and_each_piece_is_done_before_the_next() -> None:
    bench, many, few = Bench(), Owner(), Owner()
    for name in "abc":
        bench.work.add(many, bench.steps(name, 2))
    bench.work.add(few, bench.steps("x", 2))
    bench.clock.advance(20)
    assert bench.names == "aaxxbbcc"

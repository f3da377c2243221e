"""The queue of calls that wait for room upstream: round robin among owners, first come, first served within each."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from gateway.admission.owners import Owner


class WaitingCall(Protocol):
    """A call that may wait in the queue."""

    def try_admit(self) -> bool:
        """There may be room now; True if it was taken."""

    def give_way(self) -> None:
        """End this call: the queue is full, and the call's owner has the most calls in it."""


C = TypeVar("C", bound=WaitingCall)


class AdmissionQueue(OrderedDict[C, tuple[Hashable, Owner]], Generic[C]):
    """The calls that wait, at most `max_queue` of them.

    Calls that the same upstreams can take form a group, with a line for each owner. An OrderedDict, because taking the
    first key of a plain dict is O(n) after many deletions. The queue itself is the dict of all waiting calls, because
    every request checks whether it is empty.
    """

    def __init__(self, max_queue: int) -> None:
        super().__init__()
        self.max_queue = max_queue
        self._groups: OrderedDict[Hashable, OrderedDict[Owner, OrderedDict[C, None]]] = OrderedDict()
        self._waiting: Counter[Owner] = Counter()
        self._wakes = 0

    def add(self, call: C, group: Hashable, owner: Owner) -> bool:
        """Add a call to its owner's line in `group`, the upstreams that can take it; False if too many wait.

        If the queue is full, the newest call of the owner with the most calls gives way to an owner with fewer.
        """
        if owner.max_waiting is not None and self._waiting[owner] >= owner.max_waiting:
            return False
        if len(self) >= self.max_queue and not self._make_room(owner):
            return False
        self._groups.setdefault(group, OrderedDict()).setdefault(owner, OrderedDict())[call] = None
        self._waiting[owner] += 1
        self[call] = group, owner
        return True

    def _make_room(self, owner: Owner) -> bool:
        if not self._waiting:
            return False
        most, count = self._waiting.most_common(1)[0]
        if count <= self._waiting[owner] + 1:
            return False
        newest = next(call for call in reversed(self) if self[call][1] == most)
        newest.give_way()
        return len(self) < self.max_queue

    def count_of(self, owner: Owner) -> int:
        """The number of this owner's calls that wait."""
        return self._waiting[owner]

    def leave(self, call: C) -> None:
        """Remove a call, if it is in the queue."""
        place = self.pop(call, None)
        if place is None:
            return
        group, owner = place
        lines = self._groups[group]
        del lines[owner][call]
        if not lines[owner]:
            del lines[owner]
        if not lines:
            del self._groups[group]
        self._waiting[owner] -= 1
        if not self._waiting[owner]:
            del self._waiting[owner]

    def wake(self) -> None:
        """There may be room for one call: admit the first that can use it, by its owner's turn."""
        # An admitted call may end at once and call `wake` again: count these calls and do not recurse.
        self._wakes += 1
        if self._wakes > 1:
            return
        try:
            while self._wakes:
                self._admit_one()
                self._wakes -= 1
        finally:
            self._wakes = 0

    def wake_all(self) -> None:
        """There may be room for many calls."""
        for _ in range(len(self)):
            before = len(self)
            self.wake()
            if len(self) == before:
                return

    def _admit_one(self) -> None:
        # Nothing changes during the iteration until a call is admitted, and then it stops.
        for group, lines in self._groups.items():
            for owner, line in lines.items():
                if owner.is_full:
                    continue
                if not next(iter(line)).try_admit():
                    break  # the other calls of this group need the same room
                if owner in lines:
                    lines.move_to_end(owner)
                if group in self._groups:
                    self._groups.move_to_end(group)
                return

"""The owners of calls: a key or, without keys, a client address. Each owner has its turn and its share."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from gateway.wire.client_address import household

# An owner whose call was cut for the memory it held is refused for so many seconds.
_SHORT_FOR = 1.0


@dataclass(slots=True, eq=False, kw_only=True, weakref_slot=True)
class Owner:
    """An owner of calls, which share one turn.

    At most `max_in_flight` of its calls run, and `max_waiting` wait, at a time; None: as many as there is room for.
    `held` is the bytes that its calls hold. `connections` is the number of connections of this address. `short_until`
    is the time from which new calls are accepted, after one was cut for lack of room.
    """

    max_in_flight: int | None = None
    max_waiting: int | None = None
    in_flight: int = field(default=0, init=False, repr=False)
    connections: int = field(default=0, init=False, repr=False)
    held: int = field(default=0, init=False, repr=False)
    short_until: float = field(default=0.0, init=False, repr=False)

    def was_cut(self, now: float) -> None:
        """A running call was cut for lack of room: refuse new calls for a while, as these would at once be cut, too."""
        self.short_until = now + _SHORT_FOR

    @property
    def is_full(self) -> bool:
        """Whether no more calls of this owner may run."""
        return self.max_in_flight is not None and self.in_flight >= self.max_in_flight


class Owners:
    """Owners by address, each kept while it has a connection or a call; `max_in_flight` is the limit of each."""

    def __init__(self, max_in_flight: int | None = None) -> None:
        self._max_in_flight = max_in_flight
        self._by_household: WeakValueDictionary[str, Owner] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._by_household)

    def of(self, address: str) -> Owner:
        """The owner of an address; addresses of one customer's network share an owner."""
        name = household(address)
        owner = self._by_household.get(name)
        if owner is None:
            owner = self._by_household[name] = Owner(max_in_flight=self._max_in_flight)
        return owner

"""Whose calls are: a key's, or where there are no keys, an address's. Each owner has its turn and its share."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from gateway.wire.client_address import household

# Who was cut for what it held is refused for so many seconds.
_SHORT_FOR = 1.0


@dataclass(slots=True, eq=False, kw_only=True, weakref_slot=True)
class Owner:
    """Whose calls share one turn.

    At most `max_in_flight` of them run, and `max_waiting` wait, at a time; None: as many as there is room for. `held`
    is how many bytes they take, `connections` how many connections are this address's, `short_until` when new calls are
    taken again after there was no room for what ran.
    """

    max_in_flight: int | None = None
    max_waiting: int | None = None
    in_flight: int = field(default=0, init=False, repr=False)
    connections: int = field(default=0, init=False, repr=False)
    held: int = field(default=0, init=False, repr=False)
    short_until: float = field(default=0.0, init=False, repr=False)

    def was_cut(self, now: float) -> None:
        """There was no room for what ran: what comes next would be cut again at once, and so on without end."""
        self.short_until = now + _SHORT_FOR

    @property
    def is_full(self) -> bool:
        """Whether no more of its calls may run."""
        return self.max_in_flight is not None and self.in_flight >= self.max_in_flight


class Owners:
    """Those by address, each kept for as long as a connection or a call is its own; `max_in_flight` holds for each."""

    def __init__(self, max_in_flight: int | None = None) -> None:
        self._max_in_flight = max_in_flight
        self._by_household: WeakValueDictionary[str, Owner] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._by_household)

    def of(self, address: str) -> Owner:
        """Whose this address is: the same one's as its neighbours', where these are one customer's."""
        name = household(address)
        owner = self._by_household.get(name)
        if owner is None:
            owner = self._by_household[name] = Owner(max_in_flight=self._max_in_flight)
        return owner

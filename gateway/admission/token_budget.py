"""A key's tokens of a minute: reserved when a call begins, settled by what it took when it has ended."""

from __future__ import annotations

from typing import Final

_MINUTE: Final = 60.0
# So large a part of a minute's tokens may be saved up: over ten minutes that is half a per cent more than the limit.
_SAVED: Final = 1 / 20
# How much of the mean is the last call's.
_LAST: Final = 1 / 8


class TokenBudget:
    """At most `a_minute` tokens: a call may begin while there are any, and what it reserves may be more than these.

    Times are the clock's seconds.
    """

    __slots__ = ("_balance", "_counted_at", "_mean", "a_minute")

    def __init__(self, a_minute: int) -> None:
        self.a_minute = a_minute
        self._balance = a_minute * _SAVED
        self._counted_at = 0.0
        self._mean = 0.0

    def reserve(self, now: float, asked: int | None) -> float | None:
        """Take as many as a call asks for, or as the mean of those before where it does not say; None: there are none.

        What is returned is given back to `settle`.
        """
        balance = self._balance + (now - self._counted_at) * self.a_minute / _MINUTE
        saved = self.a_minute * _SAVED
        self._balance = balance = balance if balance < saved else saved
        self._counted_at = now
        if balance <= 0:
            return None
        reserved = self._mean if asked is None else float(asked)
        self._balance = balance - reserved
        return reserved

    def settle(self, now: float, reserved: float, used: int, *, told: bool = True) -> None:
        """A call has ended, and took so many; no estimate, which was not `told`, goes into the mean."""
        # As in `reserve`: a call of its own would cost each call of a key three more.
        balance = self._balance + (now - self._counted_at) * self.a_minute / _MINUTE
        saved = self.a_minute * _SAVED
        balance = (balance if balance < saved else saved) + reserved - used
        self._balance = balance if balance < saved else saved
        self._counted_at = now
        if used and told:
            self._mean += (used - self._mean) * (_LAST if self._mean else 1)

    def left(self, now: float) -> tuple[int, float]:
        """How many there are, and the seconds until there is one."""
        earned = (now - self._counted_at) * self.a_minute / _MINUTE
        balance = min(self.a_minute * _SAVED, self._balance + earned)
        return max(0, int(balance)), max(0.0, -balance) * _MINUTE / self.a_minute

"""A key's budget of tokens per minute: reserved when a call begins, settled by its real use when it has ended."""

from __future__ import annotations

from typing import Final

_MINUTE: Final = 60.0
# The part of a minute's tokens that may be saved up: over ten minutes that is half a per cent more than the limit.
_SAVED: Final = 1 / 20
# The weight of the last call in the mean.
_LAST: Final = 1 / 8


class TokenBudget:
    """At most `a_minute` tokens: a call may begin while the balance is positive, and may reserve more than the balance.

    Times are the clock's seconds.
    """

    __slots__ = ("_balance", "_counted_at", "_mean", "a_minute")

    def __init__(self, a_minute: int) -> None:
        self.a_minute = a_minute
        self._balance = a_minute * _SAVED
        self._counted_at = 0.0
        self._mean = 0.0

    def reserve(self, now: float, asked: int | None) -> float | None:
        """Reserve the tokens that a call asks for, by default the mean of earlier calls; None if none are left.

        Pass the result to `settle`.
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
        """A call has ended and `used` so many tokens; an estimate, not `told` by vLLM, is left out of the mean."""
        # The same code as in `reserve`: a function for it would cost each keyed call three more calls.
        balance = self._balance + (now - self._counted_at) * self.a_minute / _MINUTE
        saved = self.a_minute * _SAVED
        balance = (balance if balance < saved else saved) + reserved - used
        self._balance = balance if balance < saved else saved
        self._counted_at = now
        if used and told:
            self._mean += (used - self._mean) * (_LAST if self._mean else 1)

    def left(self, now: float) -> tuple[int, float]:
        """How many tokens are left, and the seconds until there is one."""
        earned = (now - self._counted_at) * self.a_minute / _MINUTE
        balance = min(self.a_minute * _SAVED, self._balance + earned)
        return max(0, int(balance)), max(0.0, -balance) * _MINUTE / self.a_minute

"""The last values of a series, in memory that is allocated once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class Ring:
    """The last rows of a table of numbers.

    A fixed array: small objects allocated every second would land among request objects and keep their arenas alive.
    """

    __slots__ = ("_columns", "_full", "_next", "_values")

    def __init__(self, rows: int, columns: int = 1) -> None:
        """Keep at most `rows` rows."""
        self._values = array("d", bytes(8 * rows * columns))
        self._columns = columns
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._next, self._full = 0, False

    def extend(self, values: Iterable[float]) -> None:
        """Add whole rows, one after the other; they replace the oldest."""
        for value in values:
            self._values[self._next] = value
            self._next += 1
            if self._next == len(self._values):
                self._next, self._full = 0, True

    def columns(self) -> list[array[float]]:
        """One array per column, the oldest row first."""
        written = self._values[: self._next]
        values = self._values[self._next :] + written if self._full else written
        return [values[column :: self._columns] for column in range(self._columns)]

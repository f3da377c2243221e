"""Values of a metric's label: names that are known, as many as may be, each for as long as it is of use."""

from __future__ import annotations

from collections.abc import Callable, Collection

# So many values a label has; what comes after these is one value.
MOST = 64
OTHER = "other"
# A client's word that is no name of ours.
UNKNOWN = "unknown"
# A name that is known no more, as a model's whose servers have left, has series for so many seconds.
_KEPT = 3600.0


class Labels(dict[str, str]):
    """The value for each name that has one; `take` gives those that have none yet theirs."""

    def __init__(self, known: Callable[[], Collection[str]], time: Callable[[], float], drop: Callable[[str], None]):
        """`known` tells the names that there are, `time` the clock's seconds; `drop` is told of a value that goes."""
        super().__init__()
        self._known = known
        self._time = time
        self._drop = drop
        self._known_at: dict[str, float] = {}

    def take(self, name: str | None) -> str:
        """The value for a name that is not among these yet."""
        known = self._known()
        if name is None or name not in known:
            return UNKNOWN
        if len(self) >= MOST:
            self.tidy()
        if len(self) >= MOST:
            return OTHER
        self._known_at[name] = self._time()
        self[name] = name
        return name

    def tidy(self) -> None:
        """Drop what has not been known for an hour."""
        known, now = self._known(), self._time()
        for name in [*self]:
            if name in known:
                self._known_at[name] = now
            elif now - self._known_at[name] >= _KEPT:
                del self[name], self._known_at[name]
                self._drop(name)

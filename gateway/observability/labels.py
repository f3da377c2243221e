"""The values of a metric's label: known names, limited in number and dropped when no longer used."""

from __future__ import annotations

from collections.abc import Callable, Collection

# A label has at most so many values; all further names share one value.
MOST = 64
OTHER = "other"
# The value for a name from a client that the gateway does not know.
UNKNOWN = "unknown"
# A name that is no longer known, as of a model whose servers were removed, keeps its series for so many seconds.
_KEPT = 3600.0


class Labels(dict[str, str]):
    """Maps names to label values; `take` assigns the value of a new name."""

    def __init__(self, known: Callable[[], Collection[str]], time: Callable[[], float], drop: Callable[[str], None]):
        """`known` returns the known names, `time` the clock's seconds; `drop` is called with each dropped value."""
        super().__init__()
        self._known = known
        self._time = time
        self._drop = drop
        self._known_at: dict[str, float] = {}

    def take(self, name: str | None) -> str:
        """The value for a name that is not in this mapping yet."""
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
        """Drop names that have not been known for an hour."""
        known, now = self._known(), self._time()
        for name in [*self]:
            if name in known:
                self._known_at[name] = now
            elif now - self._known_at[name] >= _KEPT:
                del self[name], self._known_at[name]
                self._drop(name)

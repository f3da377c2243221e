"""The last rows of a table, kept in an array that is written over."""

from __future__ import annotations

import pytest

from gateway.observability.ring import Ring


def columns(ring: Ring) -> list[list[float]]:
    return [column.tolist() for column in ring.columns()]


@pytest.mark.parametrize("written", range(8))
@pytest.mark.parametrize("together", [1, 2, 8])
def test_ring_keeps_the_last_rows_in_their_order(written: int, together: int) -> None:
    ring = Ring(3, 2)
    values = [value for row in range(written) for value in (row, row / 2)]
    for at in range(0, len(values), 2 * together):
        ring.extend(values[at : at + 2 * together])
    kept = [float(row) for row in range(written)][-3:]
    assert columns(ring) == [kept, [row / 2 for row in kept]]


@pytest.mark.parametrize("written", [1, 3, 5])
def test_cleared_ring_is_as_a_new_one(written: int) -> None:
    ring = Ring(3)
    ring.extend(range(written))
    ring.clear()
    assert columns(ring) == [[]]
    ring.extend([7, 8])
    assert columns(ring) == [[7, 8]]

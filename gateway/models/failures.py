"""What a command that moves models tells of what went wrong."""

from __future__ import annotations


class ModelError(Exception):
    """A sentence: what is wrong, and what to do."""


GB = 10**9
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def shown(size: int) -> str:
    """A number of bytes for a reader, with the units of disks and hubs: 1.53 GB."""
    amount, unit = float(size), _UNITS[0]
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            break
        amount /= 1000
    return f"{size} bytes" if unit == "bytes" else f"{amount:.2f} {unit}"

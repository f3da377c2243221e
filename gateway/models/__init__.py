"""Transfers a model's files: from a hub, into a tarball, into a bucket; and describes a model to a platform."""

from __future__ import annotations

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


class ModelError(Exception):
    """A model cannot be transferred or used; the text is a sentence that says why and what to do."""


def shown(size: int) -> str:
    """A number of bytes for a reader, with the units of disks and hubs: 1.53 GB."""
    amount, unit = float(size), _UNITS[0]
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            break
        amount /= 1000
    return f"{size} bytes" if unit == "bytes" else f"{amount:.2f} {unit}"

"""Finds how much memory the process may use: the lowest limit of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Used if no limit is found.
_DEFAULT = 1024**3


def default_max_buffered_bytes(root: Path = Path("/")) -> int:
    """Half of the container's memory limit; 1 GiB if no limit is found."""
    limits = list(_limits(root))
    return min(limits) // 2 if limits else _DEFAULT


def _limits(root: Path) -> Iterator[int]:
    """The limits of each group that the process is in: cgroups(7), both versions, as far as they can be read.

    In a container the path is the host's path or begins at the container's own group. So each parent of the path is
    tried, and a path that does not exist is skipped.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if not controllers:
            folder, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for one in (group, *group.parents):
            try:
                found = (folder / one / name).read_text().strip()
            except OSError:
                continue
            # Without a limit, version 2 says `max` and version 1 a number near the largest count of pages.
            if found.isdigit() and 0 < int(found) < 2**60:
                yield int(found)

"""How much memory the process may have: the least of what its control groups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Where there is no limit.
_DEFAULT = 1024**3


def default_max_buffered_bytes(root: Path = Path("/")) -> int:
    """Half of the memory that the container may have; 1 GiB where nothing says how much that is."""
    limits = list(_limits(root))
    return min(limits) // 2 if limits else _DEFAULT


def _limits(root: Path) -> Iterator[int]:
    """Those of each group that the process is in: cgroups(7), of both versions, as far as they can be read.

    In a container the path is of the host's or begins at the container's own group, so that its parents are looked for
    from both ends: what is not there is passed over.
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
            # Version 2 says `max` where there is none, version 1 about as much as there can be of pages.
            if found.isdigit() and 0 < int(found) < 2**60:
                yield int(found)

"""How much a container lets the gateway have, as its control groups say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.memory_limit import default_max_buffered_bytes

GIB = 1024**3
NONE = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("groups", "files", "bytes_"),
    [
        ("0::/\n", {"memory.max": str(3 * GIB)}, 3 * GIB // 2),
        ("0::/\n", {"memory.max": "max"}, GIB),
        ("0::/\n", {}, GIB),
        ("0::/a.slice/b.service\n", {"a.slice/b.service/memory.max": "max", "a.slice/memory.max": str(GIB)}, GIB // 2),
        ("0::/a/b\n", {"a/b/memory.max": str(4 * GIB), "a/memory.max": "max", "memory.max": str(8 * GIB)}, 2 * GIB),
        # A container without a namespace of its own for groups: the path is the host's.
        ("0::/docker/4f7d\n", {"memory.max": str(GIB)}, GIB // 2),
        ("3:cpu,cpuacct:/x\n2:memory:/docker/4f7d\n", {"memory/memory.limit_in_bytes": str(GIB)}, GIB // 2),
        ("2:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": NONE}, GIB),
        (None, {}, GIB),
        ("nonsense\n0::/\n", {"memory.max": "0"}, GIB),
        ("0::/\udcff\n", {"memory.max": str(GIB)}, GIB // 2),
    ],
)
def test_it_is_half_of_what_the_groups_allow(
    tmp_path: Path, groups: str | None, files: dict[str, str], bytes_: int
) -> None:
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups, errors="surrogateescape")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert default_max_buffered_bytes(tmp_path) == bytes_

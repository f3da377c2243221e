"""The checks before a local model server starts; each raises CannotStart with a sentence, or passes."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

GIB = 1024**3

# The versions that the wheels of modelserver-cpu.lock are built for.
_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 11), (3, 14)
_OLDEST_GLIBC = (2, 31)
# The state of a listening socket in /proc/net/tcp.
_LISTENS = "0A"
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class CannotStart(Exception):
    """`up` cannot start; the text is one sentence that says why and what to do."""


def check_python(version: tuple[int, ...]) -> None:
    """Check our Python's version, because the model server's environment uses the same Python."""
    found = ".".join(map(str, version[:2]))
    if version[:2] < _OLDEST_PYTHON:
        raise CannotStart(f"Python {found} is too old: the model server needs 3.11 to 3.14.")
    if version[:2] > _NEWEST_PYTHON:
        raise CannotStart(f"Python {found} is too new: the model server has wheels for 3.11 to 3.14; use one of these.")


def check_venv(can_make_environments: bool) -> None:
    """Check for venv: Debian's Python comes without the part that makes virtual environments."""
    if not can_make_environments:
        raise CannotStart(
            "This Python has no venv (the module ensurepip is missing): install it, on Debian and Ubuntu with "
            "`apt install python3-venv`."
        )


def check_wheel(system: str, machine: str, libc: tuple[str, str]) -> None:
    """Check the platform: vLLM for the CPU has wheels for Linux with glibc, on x86-64 and arm64."""
    processor = _MACHINES.get(machine.lower())
    advice = "name a Python that has a vLLM with --vllm-python, or a server that runs elsewhere with GATEWAY_UPSTREAMS"
    if system != "Linux" or processor is None:
        raise CannotStart(f"There is no wheel of vLLM for the CPU for {system} on {machine}: {advice}.")
    name, version = libc
    if name != "glibc":
        raise CannotStart(f"There is no wheel of vLLM for the CPU for Linux on {machine} without glibc: {advice}.")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST_GLIBC:
        raise CannotStart(f"glibc {version} is too old, the wheels for {machine} need 2.31 or newer: {advice}.")


def check_cpu(machine: str, cpuinfo: str) -> None:
    """Check for AVX2, for which vLLM is built on x86-64; `cpuinfo` is the text of /proc/cpuinfo."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if _MACHINES.get(machine.lower()) == "x86_64" and flags and "avx2" not in flags[1].split():
        raise CannotStart("This processor has no AVX2, which vLLM on the CPU needs: run it on a newer machine.")


def check_libraries(load: Callable[[str], object]) -> None:
    """Check for two system libraries that vLLM loads; `load` raises OSError for a missing library."""
    for library, package in (("libnuma.so.1", "libnuma1"), ("libgomp.so.1", "libgomp1")):
        try:
            load(library)
        except OSError:
            raise CannotStart(
                f"The library {library} is missing, which vLLM on the CPU needs: install it, on Debian and Ubuntu "
                f"with `apt install {package}`."
            ) from None


def check_disk(free: int, needed: int, folder: Path) -> None:
    """Check the free bytes on the disk of the environment."""
    if free < needed:
        raise CannotStart(
            f"Too little disk: {free / GIB:.1f} GiB are free in {folder}, {needed / GIB:.1f} are needed; make room, "
            "or name a folder on another disk with XDG_CACHE_HOME."
        )


def check_memory(meminfo: str, needed: int) -> None:
    """Check the available memory; `meminfo` is the text of /proc/meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found and int(found[1]) * 1024 < needed:
        raise CannotStart(
            f"Too little memory: {int(found[1]) * 1024 / GIB:.1f} GiB are available, {needed / GIB:.1f} are needed; "
            "end another program or lower VLLM_CPU_KVCACHE_SPACE."
        )


def check_port(host: str, port: int, setting: str) -> None:
    """Check that no other program listens on the port. `setting` is the setting that changes the port."""
    family, address = _address(host, port)
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        # As servers do, so that connections of an earlier run in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(port, setting, [*_listeners(address[0], port)]) from None
            raise CannotStart(
                f"Port {port} of {host} cannot be had ({error.strerror}): choose another with {setting}."
            ) from None


def check_nobody_else(host: str, port: int, setting: str, session: int) -> None:
    """Check that only processes of this session listen on the port, as far as the system shows them.

    Our child leads the session. Another program may have taken the free port since the first check, and vLLM would even
    share it (SO_REUSEPORT).
    """
    address = _address(host, port)[1]
    others = [listener for listener in _listeners(address[0], port) if not listener.is_of(session)]
    if others:
        raise _in_use(port, setting, others)


class _Listener(NamedTuple):
    """A process that listens on a port; `pid` is None if we cannot see it, as with other users' processes."""

    pid: int | None
    uid: int

    def is_of(self, session: int) -> bool:
        if self.pid is None:
            return self.uid == os.geteuid()
        try:
            return os.getsid(self.pid) == session
        except ProcessLookupError:  # the process has ended
            return True

    def __str__(self) -> str:
        if self.pid is None:
            return f"a program of user {_user(self.uid)}"
        folder = Path(f"/proc/{self.pid}")
        try:
            argv = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            return f"{program((folder / 'comm').read_text().strip(), argv)} (process {self.pid})"
        except OSError:
            return f"process {self.pid}"


def program(name: str, argv: Sequence[str]) -> str:
    """A process's name, and the module that a Python runs; no other arguments, because they may be secrets."""
    return f"{name} -m {argv[2]}" if len(argv) > 2 and argv[1] == "-m" else name


def listening_in(table: str, host: str, port: int, byteorder: str = sys.byteorder) -> Iterator[tuple[str, int]]:
    """Inode and user of each socket that listens on this port of this address.

    `table` has the format of /proc/net/tcp.
    """
    ours = ip_address(host.partition("%")[0])
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, its_port = fields[1].partition(":")
        if fields[3] != _LISTENS or int(its_port, 16) != port:
            continue
        words = [bytes.fromhex(address[at : at + 8]) for at in range(0, len(address), 8)]
        theirs = ip_address(b"".join(word[::-1] if byteorder == "little" else word for word in words))
        theirs = getattr(theirs, "ipv4_mapped", None) or theirs
        if theirs == ours or theirs.is_unspecified or ours.is_unspecified:
            yield fields[9], int(fields[7])


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotStart(f"The address {host} is none of this machine ({error.strerror}): correct it.") from None
    return family, address


def _listeners(host: str, port: int) -> Iterator[_Listener]:
    """The processes that listen on the port, from Linux's /proc; empty without /proc."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for inode, uid in listening_in(Path("/proc/self/net", table).read_text(), host, port):
                yield _Listener(_owner(f"socket:[{inode}]"), uid)


def _owner(link: str) -> int | None:
    for folder in Path("/proc").glob("[0-9]*"):
        # Skip processes of other users, and processes that have ended meanwhile.
        with contextlib.suppress(OSError):
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) == link:
                        return int(folder.name)
    return None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _in_use(port: int, setting: str, listeners: Sequence[_Listener]) -> CannotStart:
    who = " and ".join(map(str, listeners)) or "another program"
    return CannotStart(f"Port {port} is in use: {who} listens there. End it, or choose another with {setting}.")

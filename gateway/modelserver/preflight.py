"""What must be so before a local model server starts: each check is a sentence or nothing."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Callable
from pathlib import Path

GIB = 1024**3

# What the wheels of modelserver-cpu.lock are built for.
_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 11), (3, 14)
_OLDEST_GLIBC = (2, 31)
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class CannotStart(Exception):
    """Why `up` cannot start, in one sentence that says what to do."""


def check_python(version: tuple[int, ...]) -> None:
    """The model server's environment takes the Python that runs us."""
    found = ".".join(map(str, version[:2]))
    if version[:2] < _OLDEST_PYTHON:
        raise CannotStart(f"Python {found} is too old: the model server needs 3.11 to 3.14.")
    if version[:2] > _NEWEST_PYTHON:
        raise CannotStart(f"Python {found} is too new: the model server has wheels for 3.11 to 3.14; use one of these.")


def check_venv(can_make_environments: bool) -> None:
    """Debian's Python comes without the part that makes virtual environments."""
    if not can_make_environments:
        raise CannotStart(
            "This Python has no venv (the module ensurepip is missing): install it, on Debian and Ubuntu with "
            "`apt install python3-venv`."
        )


def check_wheel(system: str, machine: str, libc: tuple[str, str]) -> None:
    """There are wheels of vLLM for the CPU for Linux with glibc, on x86-64 and arm64."""
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
    """On x86-64 vLLM is built for AVX2; `cpuinfo` is the text of /proc/cpuinfo."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if _MACHINES.get(machine.lower()) == "x86_64" and flags and "avx2" not in flags[1].split():
        raise CannotStart("This processor has no AVX2, which vLLM on the CPU needs: run it on a newer machine.")


def check_libraries(load: Callable[[str], object]) -> None:
    """Two libraries of the system that vLLM loads; `load` raises OSError for one that is missing."""
    for library, package in (("libnuma.so.1", "libnuma1"), ("libgomp.so.1", "libgomp1")):
        try:
            load(library)
        except OSError:
            raise CannotStart(
                f"The library {library} is missing, which vLLM on the CPU needs: install it, on Debian and Ubuntu "
                f"with `apt install {package}`."
            ) from None


def check_disk(free: int, needed: int, folder: Path) -> None:
    """Bytes free where the environment is kept."""
    if free < needed:
        raise CannotStart(
            f"Too little disk: {free / GIB:.1f} GiB are free in {folder}, {needed / GIB:.1f} are needed; make room, "
            "or name a folder on another disk with XDG_CACHE_HOME."
        )


def check_memory(meminfo: str, needed: int) -> None:
    """`meminfo` is the text of /proc/meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found and int(found[1]) * 1024 < needed:
        raise CannotStart(
            f"Too little memory: {int(found[1]) * 1024 / GIB:.1f} GiB are available, {needed / GIB:.1f} are needed; "
            "end another program or lower VLLM_CPU_KVCACHE_SPACE."
        )


def check_port(host: str, port: int, setting: str) -> None:
    """Nothing else may listen there. `setting` is the name that changes the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotStart(f"The address {host} is none of this machine ({error.strerror}): correct it.") from None
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        # As servers do: connections of an earlier run that have not timed out yet are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"Port {port} is in use: end the program that listens there, or choose another with {setting}."
            else:
                why = f"Port {port} of {host} cannot be had ({error.strerror}): choose another with {setting}."
            raise CannotStart(why) from None

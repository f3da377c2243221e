"""The checks before a model server starts, each by the sentence that a person reads."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.modelserver import preflight
from gateway.modelserver.preflight import GIB, CannotStart


def missing(name: str) -> object:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (lambda: preflight.check_python((3, 10, 2)), "Python 3.10 is too old: the model server needs 3.11"),
        (lambda: preflight.check_python((3, 15, 0)), "Python 3.15 is too new"),
        (lambda: preflight.check_venv(can_make_environments=False), "apt install python3-venv"),
        (lambda: preflight.check_wheel("Darwin", "arm64", ("", "")), "no wheel of vLLM for the CPU for Darwin"),
        (lambda: preflight.check_wheel("Linux", "riscv64", ("glibc", "2.39")), "for Linux on riscv64"),
        (lambda: preflight.check_wheel("Linux", "aarch64", ("", "")), "aarch64 without glibc"),
        (lambda: preflight.check_wheel("Linux", "aarch64", ("glibc", "2.28")), "glibc 2.28 is too old"),
        (lambda: preflight.check_cpu("x86_64", "model : x\nflags\t\t: fpu sse4_2 avx\n"), "no AVX2"),
        (lambda: preflight.check_libraries(missing), "apt install libnuma1"),
        (lambda: preflight.check_disk(GIB, 4 * GIB, Path("/home/x")), "1.0 GiB are free in /home/x, 4.0 are needed"),
        (lambda: preflight.check_memory("MemAvailable:  1048576 kB\n", 3 * GIB), "1.0 GiB are available, 3.0 are"),
        (lambda: preflight.check_port("192.0.2.1", 9000, "GATEWAY_PORT"), "choose another with GATEWAY_PORT"),
        (lambda: preflight.check_port("no host", 9000, "GATEWAY_PORT"), "is none of this machine"),
    ],
)
def test_what_is_wrong_is_one_sentence(check: Callable[[], None], sentence: str) -> None:
    with pytest.raises(CannotStart) as caught:
        check()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_right_passes() -> None:
    preflight.check_python((3, 11, 0))
    preflight.check_python((3, 14, 9))
    preflight.check_venv(can_make_environments=True)
    preflight.check_wheel("Linux", "x86_64", ("glibc", "2.31"))
    preflight.check_wheel("Linux", "aarch64", ("glibc", "2.39"))
    preflight.check_cpu("x86_64", "flags : fpu avx avx2\n")
    preflight.check_cpu("aarch64", "Features : fp asimd\n")
    preflight.check_libraries(str)
    preflight.check_disk(4 * GIB, 4 * GIB, Path("/"))
    preflight.check_memory("MemAvailable: 9999999 kB\n", GIB)
    preflight.check_memory("nothing of use", GIB)


def test_a_port_in_use_is_told_with_the_setting_that_changes_it() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=f"Port {port} is in use: .* choose another with LLM_VLLM_PORT"):
            preflight.check_port("127.0.0.1", port, "LLM_VLLM_PORT")
    preflight.check_port("127.0.0.1", port, "LLM_VLLM_PORT")

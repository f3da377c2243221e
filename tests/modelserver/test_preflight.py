"""The checks before a model server starts, each by the sentence that a person reads."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
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


LISTEN = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], 0), family=family)
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process of its own session that listens on the port."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, host], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_port_in_use_is_told_with_the_setting_that_changes_it() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"Port {port} is in use: .*\. .* choose another with LLM_VLLM_PORT"):
            preflight.check_port("127.0.0.1", port, "LLM_VLLM_PORT")
    preflight.check_port("127.0.0.1", port, "LLM_VLLM_PORT")


linux = pytest.mark.skipif(sys.platform != "linux", reason="who listens on a port stands in Linux's /proc")


@linux
@pytest.mark.parametrize(("theirs", "ours"), [("127.0.0.1", "localhost"), ("0.0.0.0", "127.0.0.1"), ("::1", "::")])
def test_who_has_the_port_is_named(theirs: str, ours: str) -> None:
    with listening(theirs) as (process, port), pytest.raises(CannotStart) as caught:
        preflight.check_port(ours, port, "GATEWAY_PORT")

    program = Path(sys.executable).name
    assert str(caught.value) == (
        f"Port {port} is in use: {program} (process {process.pid}) listens there. End it, or choose another with "
        "GATEWAY_PORT."
    )


@linux
def test_a_module_that_python_runs_is_named_and_no_argument_is() -> None:
    argv = ["/usr/bin/python3", "-m", "vllm.entrypoints.openai.api_server", "--api-key", "s3cret"]
    assert preflight.program("python3", argv) == "python3 -m vllm.entrypoints.openai.api_server"
    assert preflight.program("nginx", ["nginx: master process"]) == "nginx"


@linux
def test_the_table_of_sockets_is_read_as_linux_writes_it() -> None:
    # As /proc/net/tcp and tcp6 of a machine with little endian have them; st 0A listens.
    tcp = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F48 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 111 1 0\n"
        "   1: 0100007F:1F48 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  1000        0 112 1 0\n"
        "   2: 00000000:2328 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 113 1 0\n"
        "   3: 0500A8C0:1F48 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 114 1 0\n"
        "   4: 0000000000000000FFFF00000100007F:1F48 0000:0000 0A 0:0 00:0 0 33 0 115 1 0\n"
    )
    assert list(preflight.listening_in(tcp, "127.0.0.1", 8008, "little")) == [("111", 1000), ("115", 33)]
    assert list(preflight.listening_in(tcp, "127.0.0.1", 9000, "little")) == [("113", 0)]
    assert [inode for inode, _ in preflight.listening_in(tcp, "0.0.0.0", 8008, "little")] == ["111", "114", "115"]


@linux
def test_a_port_of_ours_that_another_took_is_told() -> None:
    with listening() as (process, port):
        assert process.pid is not None
        preflight.check_nobody_else("127.0.0.1", port, "LLM_VLLM_PORT", process.pid)
        with pytest.raises(CannotStart, match=rf"Port {port} is in use: .* \(process {process.pid}\) listens there"):
            preflight.check_nobody_else("127.0.0.1", port, "LLM_VLLM_PORT", os.getpid())
    preflight.check_nobody_else("127.0.0.1", port, "LLM_VLLM_PORT", os.getpid())

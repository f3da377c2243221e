"""A child process that never outlives us; the same holds for every process it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_PR_SET_PDEATHSIG = 1
_TICK = 0.02
# The exit code if the real one is lost; subprocess uses the same.
_UNKNOWN = 0


class Child:
    """One process in its own session, so that Ctrl-C in the terminal reaches us alone and we end it in order."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: Path | None = None,
        piped: bool = False,
        grace: float = 10,
    ) -> None:
        """Its output goes to `log`, which is truncated first, or is `piped` to `lines`, or else goes where ours goes.

        `grace` is the seconds that it gets to end after SIGTERM.
        """
        self._argv = list(argv)
        self._environment = dict(environment)
        self._log = log
        self._piped = piped
        self._grace = grace
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Raises OSError."""
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | int | None = subprocess.PIPE if self._piped else None
            if self._log:
                output = stack.enter_context(_private(self._log))
            self._process = subprocess.Popen(
                self._argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )

    @property
    def pid(self) -> int | None:
        """Its process id, None before the start."""
        return self._process.pid if self._process else None

    def exit_code(self) -> int | None:
        """The exit code; None while the process runs or before the start."""
        process = self._process
        # Not Popen.poll(): an exception from a signal handler inside it may leave its lock held, and wait() would hang.
        if process is not None and process.returncode is None:
            try:
                ended, status = os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:  # a signal handler raised before an earlier status was kept
                process.returncode = _UNKNOWN
            else:
                process.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return process.returncode if process else None

    def wait(self) -> int:
        """Wait for the end of the process; returns its exit code. Call it after `start`."""
        assert self._process is not None
        return self._process.wait()

    def lines(self, tick: float) -> Iterator[str]:
        """Yield its lines as they come, until its output ends; yield an empty line after each silent `tick` seconds."""
        assert self._process is not None
        assert self._process.stdout is not None
        output, rest = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if not selector.select(tick):
                    yield ""
                    continue
                read = os.read(output, 65536)
                if not read:
                    break
                *lines, rest = (rest + read).split(b"\n")
                yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
        if rest:
            yield rest.decode(errors="replace")

    def stop(self) -> None:
        """Send SIGTERM, then after its end or its grace send SIGKILL to all that it started. May be called again.

        Only the process itself gets SIGTERM, as in a container: vLLM finishes its answers only if it ends its engine
        itself.
        """
        process = self._process
        if process is None:
            return
        try:
            if self.exit_code() is None:
                os.kill(process.pid, signal.SIGTERM)
                until = time.monotonic() + self._grace
                while self.exit_code() is None and time.monotonic() < until:
                    time.sleep(_TICK)
        finally:
            # Processes that it started may have outlived it. A second Ctrl-C jumps here at once.
            _kill_group(process.pid)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def dies_with_parent() -> Callable[[], None] | None:
    """A function for a child to run before its program, so that even `kill -9` of us ends the child. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here, because between fork and exec almost nothing is safe
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(1)

    return ask


def last_lines(log: Path, count: int = 20) -> str:
    """The last lines of a log, for the error that says why its process died."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


def _private(log: Path) -> IO[bytes]:
    # Private, because a model server's log may contain prompts.
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)

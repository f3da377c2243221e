"""A child process that never outlives us, with everything it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_PR_SET_PDEATHSIG = 1


class Child:
    """One process in a session of its own, so that Ctrl-C in the terminal reaches us alone and we end it in order."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: Path | None = None,
        grace: float = 10,
    ) -> None:
        self._argv = list(argv)
        self._environment = dict(environment)
        self._log = log
        self._grace = grace
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its output goes to the log, which begins anew, or else where ours goes."""
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(_private(self._log)) if self._log else None
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
        """How it ended, None while it runs or before the start."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """End it and all that it started: SIGTERM, and SIGKILL after the grace. May be called again."""
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGTERM)
                process.wait(self._grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # What it started may have outlived it; a second Ctrl-C comes here at once.
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def dies_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program, so that even `kill -9` of us ends it. Linux alone has this."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec almost nothing is safe
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(1)

    return ask


def last_lines(log: Path, count: int = 20) -> str:
    """The end of a log, for the sentence that says why its process died."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


def _private(log: Path) -> IO[bytes]:
    # Prompts may stand in a model server's log.
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)

"""The entry point of the command line: `vllm-gateway` and `python -m gateway`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    command = sys.argv[1:2]
    if command in (["serve"], ["up"]):
        # The remaining imports take half a second, in which a signal's default action would kill the process. There is
        # nothing to reread yet, and nothing to shut down gracefully.
        if command == ["serve"]:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
    # httpx imports its own command line, with rich and pygments where they are installed: 3 MB, and half of its import
    # time. None makes the import of that module fail (language reference, 5.3.1), and httpx does without; typeshed does
    # not know this. So the gateway's command line is imported after this line.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    from gateway.cli import main as run

    run()


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # an exception may be lost in the middle of an import


if __name__ == "__main__":
    main()

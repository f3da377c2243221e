"""Where the command line starts: `vllm-gateway`, and `python -m gateway`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    command = sys.argv[1:2]
    if command in (["serve"], ["up"]):
        # The rest takes half a second to import, in which a signal's own action would be the end. There is nothing to
        # read again yet, and nothing to end in good order.
        if command == ["serve"]:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
    # httpx brings a command line of its own, with rich and pygments where they are installed: 3 MB, and half of its
    # import. None makes the import of a module fail (language reference, 5.3.1), and httpx do without; typeshed does
    # not have it. So the command line is imported after this.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    from gateway.cli import main as run

    run()


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # an exception might be lost in the midst of an import


if __name__ == "__main__":
    main()

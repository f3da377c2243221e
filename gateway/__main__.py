"""Where the command line starts: `vllm-gateway`, and `python -m gateway`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    # httpx brings a command line of its own, with rich and pygments where they are installed: 3 MB, and half of its
    # import. None makes the import of a module fail (language reference, 5.3.1), and httpx do without; typeshed does
    # not have it. So the command line is imported after this.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    from gateway.cli import main as run

    run()


if __name__ == "__main__":
    main()

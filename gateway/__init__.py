"""A thin gateway in front of vLLM model servers."""

import sys

# httpx brings a command line of its own, with rich and pygments where they are installed: 3 MB, and half of its import.
# None makes the import of a module fail (language reference, 5.3.1), and httpx do without; typeshed does not have it.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

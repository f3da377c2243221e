"""Describes why a connection failed, without any address, because clients read the text."""

from __future__ import annotations

import ssl

REFUSED = "connection refused"


def describe_error(error: BaseException) -> str:
    """Describe the first system error in a chain of errors."""
    before, seen = error, {error}  # the chain of a re-raised error may have a cycle
    while (earlier := before.__cause__ or before.__context__) is not None and earlier not in seen:
        before = earlier
        seen.add(before)
        if isinstance(before, OSError):
            error = before
    # If all addresses of a host refuse, one OSError lists them.
    if isinstance(error, ConnectionRefusedError) or "refused" in str(error) or "Connect call failed" in str(error):
        return REFUSED
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it reset the connection"
    if isinstance(error, ssl.SSLCertVerificationError):
        # The rest of the message names the host.
        return f"its certificate is not valid ({error.verify_message.partition(', certificate is not')[0]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__

"""Why a connection failed, in words that hold no address: clients read them."""

from __future__ import annotations

import ssl

REFUSED = "connection refused"


def describe_error(error: BaseException) -> str:
    """What the system said first, where one error led to another."""
    before, seen = error, {error}  # as one that is raised again may lead back to itself
    while (earlier := before.__cause__ or before.__context__) is not None and earlier not in seen:
        before = earlier
        seen.add(before)
        if isinstance(before, OSError):
            error = before
    # A host of several addresses, all of which refuse, comes as one OSError that lists them.
    if isinstance(error, ConnectionRefusedError) or "refused" in str(error) or "Connect call failed" in str(error):
        return REFUSED
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it reset the connection"
    if isinstance(error, ssl.SSLCertVerificationError):
        # What follows is for which name.
        return f"its certificate is not valid ({error.verify_message.partition(', certificate is not')[0]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__

"""The fields that tie a call to its key at vLLM: the owner of a stored response, and the salt of the prefix cache.

vLLM stores a response under the call's `request_id` and returns it to any client that knows this id. So the gateway
chooses the id: a random part, and an HMAC of that part under the key's digest. Every gateway that knows the key can
tell from an id alone whether the response is the key's, and no gateway has to store ids.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import Any, Final

from gateway.wire.errors import NoSuchResponse

_RESPONSE_ID: Final = re.compile(r"resp_([0-9a-f]{32})([0-9a-f]{32})")
# In bytes: the size of the random part.
_MARK: Final = 16


@dataclass(frozen=True, slots=True)
class KeyMarks:
    """The marks of one call. `digest` is the SHA-256 of its key.

    `call_id`, 32 hexadecimal digits, is the random part of the response's id; None if the route stores no response.
    `salts` says that the key has its own part of vLLM's prefix cache.
    """

    digest: bytes
    call_id: str | None
    salts: bool

    def fields(self, body: dict[str, Any]) -> dict[str, str]:
        """The fields to set in the call's body. Raises NoSuchResponse if it continues the response of another key."""
        found: dict[str, str] = {}
        if self.call_id is not None:
            previous = body.get("previous_response_id")
            if type(previous) is str:  # vLLM refuses anything else
                check_owner(self.digest, previous)
            found["request_id"] = f"resp_{self.call_id}{_mark(self.digest, self.call_id)}"
        if self.salts:
            # A client may separate its own customers by a salt of its own, so that salt enters the hash.
            own = body.get("cache_salt")
            found["cache_salt"] = _hash(self.digest, f"cache_salt:{own if type(own) is str else ''}").hex()
        return found


def check_owner(digest: bytes, response_id: str) -> None:
    """Raises NoSuchResponse if `response_id` was not made for the key with this digest."""
    found = _RESPONSE_ID.fullmatch(response_id)
    if found is None or not hmac.compare_digest(found[2], _mark(digest, found[1])):
        raise NoSuchResponse(response_id)


def _mark(digest: bytes, call_id: str) -> str:
    return _hash(digest, f"response:{call_id}")[:_MARK].hex()


def _hash(digest: bytes, text: str) -> bytes:
    return hmac.digest(digest, text.encode(), "sha256")

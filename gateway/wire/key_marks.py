"""What a call of a key tells vLLM of that key: whose a stored response is, and whose the prefixes of its cache are.

vLLM stores a response under the `request_id` that the call brings, and gives it to whoever knows that id. So the
gateway chooses the id: a random part, and a part that only this key's digest makes of it. Every gateway that knows the
key can tell from an id alone whose it is, and none has to remember any.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import Any, Final

from gateway.wire.errors import NoSuchResponse

_RESPONSE_ID: Final = re.compile(r"resp_([0-9a-f]{32})([0-9a-f]{32})")
# In bytes: as many as the random part has.
_MARK: Final = 16


@dataclass(frozen=True, slots=True)
class KeyMarks:
    """The marks of one call. `digest` is its key's SHA-256.

    `call_id`, 32 hexadecimal digits, is the random part of the response's id; None where there is no response. `salts`
    says that the key has its own part of vLLM's prefix cache.
    """

    digest: bytes
    call_id: str | None
    salts: bool

    def fields(self, body: dict[str, Any]) -> dict[str, str]:
        """What the call's body has to say of its key. Raises NoSuchResponse where it goes on with another key's."""
        found: dict[str, str] = {}
        if self.call_id is not None:
            previous = body.get("previous_response_id")
            if type(previous) is str:  # vLLM refuses anything else
                check_owner(self.digest, previous)
            found["request_id"] = f"resp_{self.call_id}{_mark(self.digest, self.call_id)}"
        if self.salts:
            # A caller may have customers of its own to keep apart, by a salt of its own.
            own = body.get("cache_salt")
            found["cache_salt"] = _hash(self.digest, f"cache_salt:{own if type(own) is str else ''}").hex()
        return found


def check_owner(digest: bytes, response_id: str) -> None:
    """Raises NoSuchResponse where this is not the id of a response that the key with this digest has asked for."""
    found = _RESPONSE_ID.fullmatch(response_id)
    if found is None or not hmac.compare_digest(found[2], _mark(digest, found[1])):
        raise NoSuchResponse(response_id)


def _mark(digest: bytes, call_id: str) -> str:
    return _hash(digest, f"response:{call_id}")[:_MARK].hex()


def _hash(digest: bytes, text: str) -> bytes:
    return hmac.digest(digest, text.encode(), "sha256")

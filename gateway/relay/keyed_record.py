"""A call's record with its key: which calls and models the key allows, and what is left of its limits."""

from __future__ import annotations

import math
from typing import Final
from urllib.parse import quote

from gateway.admission.keys import Key, Keys
from gateway.admission.owners import Owner
from gateway.relay.time_limits import TimedRecord
from gateway.relay.usage import TOKEN
from gateway.wire.errors import GatewayError, NoSuchResponse, NotServed, RateLimited, Unauthorized, naming_served
from gateway.wire.heads import AnswerHead, Header
from gateway.wire.key_marks import KeyMarks, check_owner

LIMIT_HEADERS: Final = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
TOKEN_HEADERS: Final = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
ROUTE_HEADERS: Final = (b"x-gateway-upstream", b"x-gateway-model")
# Characters of names that are not percent-encoded in these headers (RFC 3986, 2.1).
_PLAIN: Final = "/:@+"
_LONGEST_NAME: Final = 200
JSON: Final = (b"content-type", b"application/json")
# An upstream's answer for a path that it does not have.
NO_SUCH_PATH: Final = b'{"detail":"Not Found"}'
KEY_NEEDED: Final = "A key is needed: send it as Authorization: Bearer KEY, or as x-api-key or api-key."


class KeyedRecord(TimedRecord):
    """A record with its owner. An exchange sets `owner`, which a key may replace, and sets `_reserved` to None.

    `_asked` is how many tokens the call asks for, None if it does not say; it is valid if `_reserved` is not None.
    """

    __slots__ = ("_asked", "_reserved", "owner")

    owner: Owner
    _asked: int | None
    _reserved: float | None

    def _key_refusal(self, keys: Keys) -> GatewayError | None:
        """Why this client may not call now."""
        digest = self._request.key
        if digest is None:
            return Unauthorized(KEY_NEEDED)
        key = self.key = keys.find(digest)
        if key is None:
            return Unauthorized("The key that was sent is none of this gateway's.")
        self.owner = key
        if wait := key.take(self.started_at):
            return RateLimited(
                f"The key {key.name} has made its {key.a_minute} requests of this minute: try again in {wait:.0f} s.",
                retry_after=math.ceil(wait),
            )
        if self.route.body == "none" and self.route.replays:
            try:
                check_owner(digest, self.target.split("/")[3].partition("?")[0])
            except NoSuchResponse as error:
                return error
        return None

    def _marks(self) -> KeyMarks | None:
        """The marks that tie the call to its key at vLLM; None if it needs none."""
        digest, route = self._request.key, self.route
        is_response, salts = route.body == "response", self._path.salts_caches and route.caches_prefixes
        if digest is None or not (is_response or salts):
            return None
        return KeyMarks(digest, self.upstream_id if is_response else None, salts)

    def _bounded_by_key(self, key: Key, content: bytes) -> GatewayError | None:
        """Why the key does not allow this call: the model is not the key's, or the key's tokens are used up."""
        models = key.models
        if models is not None and self.model not in models and self.alias not in models and self.route.body != "none":
            asked = f"the model {self.model[:200]!r}" if self.model else "a call that does not say of which model"
            return NotServed(f"The key {key.name} is not for {asked}; it is for {', '.join(sorted(models))}.")
        if key.tokens is not None and self.route.takes_tokens:
            now = self._path.time()
            self._asked = self._path.reader.asked_tokens(self.route.body, content) if content else None
            self._reserved = key.tokens.reserve(now, self._asked)
            if self._reserved is None:
                _, wait = key.tokens.left(now)
                return RateLimited(
                    f"The key {key.name} has used its {key.tokens.a_minute} tokens of this minute: try again in "
                    f"{wait:.0f} s.",
                    retry_after=math.ceil(wait),
                )
        return None

    def _not_found(self, head: AnswerHead, content: bytes) -> tuple[AnswerHead, bytes]:
        """An upstream's 404, completed: it lacks the path, or the model, while others may be served elsewhere."""
        if content == NO_SUCH_PATH:
            rest = [header for header in head.headers if header[0] != b"content-type"]
            error = self._not_served()
            return AnswerHead(404, [JSON, *rest, *error.answer_headers]), error.envelope(self.request_id)
        served, key = self._path.reader.named_models, self.key
        if key is not None and key.models is not None:
            served = tuple(name for name in served if name in key.models)
        if self.model and self.model not in served:
            content = naming_served(content, self.model, served)
        return head, content

    def _not_served(self) -> NotServed:
        """The error for the upstream's "Not Found": its model is of another kind."""
        able = self._path.pool.models_of(self.route.asked_for_as)
        others = f"; those that do: {', '.join(able)}." if able else "."
        model = f"The model {self.model[:200]!r}" if self.model else "The model server's model"
        return NotServed(f"{model} does not take {self.route.path}{others}")

    def _with_own(self, head: AnswerHead) -> AnswerHead:
        """The head with the rest of the key's requests and tokens, in the headers that OpenAI's clients know.

        If a setting asks for it, the head also names the upstream, and the model with its alias.
        """
        own: list[Header] = []
        key, upstream = self.key, self.upstream
        if key is not None:
            now = self._path.time()
            limits = [] if key.a_minute is None else [(LIMIT_HEADERS, key.a_minute, key.left(now))]
            if key.tokens is not None:
                limits.append((TOKEN_HEADERS, key.tokens.a_minute, key.tokens.left(now)))
            for (limit, remaining, until), most, (left, reset) in limits:
                own += [(limit, b"%d" % most), (remaining, b"%d" % left), (until, b"%.3fs" % reset)]
        if upstream is not None and self._path.tells_route:
            own.append((ROUTE_HEADERS[0], upstream.short_name.encode()))
            if self.model:
                alias = f"; alias={_plain(self.alias)}" if self.alias else ""
                own.append((ROUTE_HEADERS[1], f"{_plain(self.model)}{alias}".encode()))
        if not own:
            return head
        return AnswerHead(head.status, own, streams=head.streams, encoding=head.encoding, behind=head)

    def _settle(self, reserved: float) -> None:
        """Charge the key's budget with the tokens of this call; without usage they are estimated, as for the log."""
        assert self.key is not None
        used, usage = 0, self.usage
        if usage is not None:
            used = usage[0] + usage[1]
        elif (found := self.tokens) is not None:
            used = found[0] + found[1]
        elif self._took_tokens:
            used = self._estimated_whole(reserved)
        if self.key.tokens is not None:  # None if a reload of the file of keys has removed the budget
            self.key.tokens.settle(self.ended_at or self.started_at, reserved, used, told=usage is not None)

    def _estimated_whole(self, reserved: float) -> int:
        """The estimated tokens of a call that is not streamed and whose usage is not known.

        If there is no answer, or it is yet to be made, as in the background, the most that it may use is charged.
        """
        prompt = self.prompt_bytes // TOKEN
        if not self.route.generates:
            return prompt
        if self.outcome == "done" and self.route.body != "response":
            return prompt + self.bytes_out // TOKEN
        return max(prompt, round(reserved)) if self._asked is None else prompt + self._asked


def _plain(name: str) -> str:
    return quote(name[:_LONGEST_NAME], _PLAIN, errors="replace")

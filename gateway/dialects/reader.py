"""Reads a request's body: returns the upstream's body, or a translation if the form is not vLLM's own."""

from __future__ import annotations

import math
from collections.abc import Container, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from orjson import JSONDecodeError, loads

from gateway.dialects import erag, media_urls, prompts, simplified
from gateway.dialects.body_limits import BodyLimits
from gateway.dialects.json_body import (
    LONG_BODY,
    kind_of,
    long_strings_in_steps,
    to_object,
    to_utf8,
    without_long_strings,
)
from gateway.dialects.langchain import Flattened
from gateway.dialects.streams import Style
from gateway.wire.body_edit import edited
from gateway.wire.errors import BadRequest, ForeignMedia, GatewayError, NoneReady, Rejected
from gateway.wire.heads import AnswerHead
from gateway.wire.key_marks import KeyMarks
from gateway.wire.routes import BodyKind, Route


class TranslatedStream(Protocol):
    """Translates the upstream's stream to the reply's, whose head is `head`."""

    head: AnswerHead
    # Whether each event is sent in a write of its own, some time after the event before.
    paced: bool
    # `system_fingerprint` of the server's answers, with its quotes: set from earlier answers, updated from this one.
    fingerprint: bytes | None

    def feed(self, data: bytes) -> bytes:
        """The bytes to send for these bytes; raises GatewayError if they are not what the upstream should send."""

    def comment(self, data: bytes) -> bytes:
        """The bytes to send now for comments: unchanged, unless clients of this form know none or events are held."""

    def failed(self, envelope: bytes) -> bytes:
        """The last bytes of the stream for an error of the gateway's own."""


class Translation(Protocol):
    """A checked request in a form that is not vLLM's: makes the call of `target` and translates its answer back."""

    model: str | None
    streaming: bool

    @property
    def target(self) -> str: ...

    def to_call(self, model: str) -> bytes:
        """The upstream's body; raises BadRequest."""

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply; raises UpstreamBroken."""

    def to_stream(self) -> TranslatedStream | None:
        """The stream's translator; None if the upstream's stream is relayed unchanged."""


class Models(Protocol):
    """The served models."""

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def chat_model(self) -> str | None:
        """The first model that can chat, as far as is known."""

    def models_of(self, route: str) -> list[str]:
        """The models whose servers are known to have this route."""

    def context(self, model: str) -> int | float: ...


class Alias(Protocol):
    """Another name of one or several models."""

    splits: bool

    def choose(self, served: Container[str]) -> str:
        """The model of the next call."""

    def first(self, served: Container[str]) -> str:
        """One of the models, for purposes other than a call."""

    def is_served(self, served: Container[str]) -> bool: ...


# More tokens than any call can have: beside larger numbers a budget, which is a float, would lose small ones.
_MOST_TOKENS: Final = 1_000_000_000
# The fields that limit the length of an answer.
_ANSWER: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")

# The upstream's body (empty if there is a translation); form, model, streaming, translation; whether the upstream is
# asked for a stream's usage, which is hidden from the client; the upstream's `cache_salt`; and the alias by which the
# model was asked for. A plain tuple: a class of its own would cost each request one more call.
Reading = tuple[bytes, str, str | None, bool, Translation | None, bool, Any, str | None]
Steps = Generator[None, None, Reading]


@dataclass(frozen=True, slots=True)
class BodyReader:
    """Reads bodies by a gateway's settings, whose names the fields have; `models` are those of its upstreams.

    `disable_streaming` answers every translated request whole, whichever setting asks for that. `counts_tokens` asks
    the upstream for the usage of simplified streams, `counts_all` for the usage of all streams.
    """

    models: Models
    body_limits: BodyLimits
    media_domains: frozenset[str]
    model: str | None
    stream_style: Style
    system_role: Literal["system", "merge"]
    disable_streaming: bool
    connector: Literal["generic", "langchain"]
    compat: erag.Release | None
    forward_sampling: bool
    model_aliases: Mapping[str, Alias]
    counts_tokens: bool
    counts_all: bool

    def read(self, kind: BodyKind, content: bytes, marks: KeyMarks | None = None) -> Reading:
        """Read a body of this kind, with its key's `marks` if any; raises GatewayError, which names the field.

        The form is `openai` if the body is vLLM's own, and `simplified`, `generate` or `ask` if there is a
        translation; it is empty if there is no body.
        """
        if kind == "none":
            return b"", "", None, False, None, False, None, None
        if len(content) >= LONG_BODY:
            return _result(self.read_in_steps(kind, content, marks))
        if content[:2] != b'{"':
            content = to_utf8(content)
        if self.compat is not None and kind == "chat":
            return _result(self._read_released(self.compat, content, None, marks))
        body = to_object(content)
        translates = kind in ("generate", "ask") or (kind == "chat" and not self._is_openai(body))
        self._check(kind, body, content)
        if translates:
            form, translation = self._translate(kind, body)
            return b"", form, None, translation.streaming, translation, False, body.get("cache_salt"), None
        if marks is not None or self.model_aliases or self.counts_all or self.body_limits.max_new_tokens < math.inf:
            return self._edited(kind, content, body, marks)
        model = body.get("model")
        model = model if isinstance(model, str) else None
        return content, "openai", model, body.get("stream") is True, None, False, body.get("cache_salt"), None

    def read_in_steps(self, kind: BodyKind, content: bytes, marks: KeyMarks | None = None) -> Steps:
        """Like `read`, for a complete long body: in steps, each of which takes a small part of a second."""
        if content[:2] != b'{"':
            content = to_utf8(content)
        yield
        shortened = without_long_strings(content)
        if 2 * len(shortened) > self.body_limits.max_json_bytes:
            yield
            shortened = without_long_strings(content, (yield from long_strings_in_steps(content)))
        yield
        yield from self.body_limits.check_size(content, shortened)
        if self.compat is not None and kind == "chat":
            return (yield from self._read_released(self.compat, content, shortened, marks))
        return (yield from self._read_long(kind, content, shortened, marks))

    def _read_long(self, kind: BodyKind, content: bytes, shortened: bytes, marks: KeyMarks | None) -> Steps:
        body = yield from self._shortened_passthrough(kind, shortened)
        if body is None:
            self.body_limits.check_whole(content, shortened)
            yield
            body = to_object(content)
            yield
            translates = kind in ("generate", "ask") or (kind == "chat" and not self._is_openai(body))
            yield from self._check_in_steps(kind, body, content)
            if translates:
                form, translation = self._translate(kind, body)
                return b"", form, None, translation.streaming, translation, False, body.get("cache_salt"), None
        return self._edited(kind, content, body, marks)

    def _read_released(
        self, release: erag.Release, content: bytes, shortened: bytes | None, marks: KeyMarks | None
    ) -> Steps:
        """Read a chat call's body in place of a release; `shortened` is a long body without its long strings."""
        try:
            body = (yield from self._shortened_passthrough("chat", shortened)) if shortened is not None else None
            if body is None:
                if shortened is not None:
                    self.body_limits.check_whole(content, shortened)
                    yield
                body = to_object(content)
                yield
                is_openai = self._is_openai(body)
                if not is_openai:
                    body = erag.checked(body, content, release, forward_sampling=self.forward_sampling)
                    yield
                yield from self._check_in_steps("chat", body, content)
                if not is_openai:
                    _, translation = self._translate("chat", body)
                    return (
                        b"",
                        "simplified",
                        None,
                        translation.streaming,
                        translation,
                        False,
                        body.get("cache_salt"),
                        None,
                    )
        except (Rejected, erag.Unprocessable):
            raise
        except BadRequest as error:
            raise erag.unprocessable(error, content) from None
        return self._edited("chat", content, body, marks)

    def _edited(self, kind: BodyKind, content: bytes, body: dict[str, Any], marks: KeyMarks | None) -> Reading:
        """A body in vLLM's own form, edited: the alias's model, the key's marks, limits and the request for usage."""
        model, streaming = body.get("model"), body.get("stream") is True
        model = model if isinstance(model, str) else None
        known = self.resolve(kind, model) if self.model_aliases or self.compat else model
        changes: dict[str, Any] = {}
        alias = None
        if known != model:
            changes["model"], alias, model = known, model, known
        asks = streaming and self.counts_all and kind in ("chat", "completion")
        if asks and (options := simplified.usage_options(body.get("stream_options"))):
            changes["stream_options"] = options
        bounded = self.body_limits.max_new_tokens < math.inf
        if bounded and (limit := self.body_limits.missing_limit(kind, body)):
            changes |= limit
        if marks is not None:
            changes |= marks.fields(body)
        if changes:
            content = edited(content, body, **changes)
        salt = changes.get("cache_salt", body.get("cache_salt"))
        return content, "openai", model, streaming, None, "stream_options" in changes, salt, alias

    def asked_tokens(self, kind: BodyKind, content: bytes) -> int | None:
        """How many tokens an upstream's body asks for; None if it does not say."""
        try:
            body = loads(without_long_strings(content) if len(content) >= LONG_BODY else content)
        except JSONDecodeError:  # the shortened body is not valid JSON: parse the full one
            body = to_object(content)
        asked = 0
        for name in _ANSWER:
            value = body.get(name)
            if type(value) is int and value > asked:
                asked = value
        if not asked:
            return None  # missing, or a value that vLLM refuses
        # A chat without `n` has one answer; for other bodies it depends.
        answers = 1 if kind == "chat" and "n" not in body else self.body_limits.answers(body)
        return min(_MOST_TOKENS, asked * answers)

    def resolve(self, kind: BodyKind, model: str | None) -> str | None:
        """The model for this name: a model of its alias, or of the alias `*` for all names that are not served.

        A release knew only its own model. Any other unknown name is relayed: the upstream may load it, or refuses it.
        """
        if not model:
            return model
        served, alias = self.models.models, self.model_aliases.get(model)
        if model in served and (alias is None or not alias.splits):
            return model
        if alias := alias or self.model_aliases.get("*"):
            return alias.choose(served)
        if self.compat is not None and kind == "chat" and served:
            return self.model or self.models.chat_model
        return model

    @property
    def named_models(self) -> tuple[str, ...]:
        """All names that a call may give its model: the served models and their aliases."""
        served = self.models.models
        others = [name for name, alias in self.model_aliases.items() if name != "*" and alias.is_served(served)]
        return tuple(dict.fromkeys((*served, *others)))

    @property
    def default_model(self) -> str | None:
        """The model of a simplified call that names none; None if no model is known."""
        return self.resolve("chat", self.model) or self.models.chat_model

    def select_model(self, translation: Translation) -> str:
        """The model of a translated call: its own, the configured one or the first that can chat. Raises NoneReady."""
        model = self.resolve("chat", translation.model) or self.default_model
        if model is None:
            raise NoneReady("No model server has answered yet: it may still be loading. Try again soon.")
        return model

    def model_of(self, route: Route) -> str | None:
        """The model of a call in vLLM's own form that names none: always the same one of those that have the route."""
        able = self.models.models_of(route.asked_for_as) or self.models.models
        configured = self.resolve("chat", self.model)
        return configured if configured in able else next(iter(able), None)

    def uses_erag_errors(self, kind: BodyKind, form: str) -> bool:
        """Whether errors have the release's form: for a chat call that is not known to be in OpenAI's form."""
        return self.compat is not None and kind == "chat" and form != "openai"

    def to_error(self, error: GatewayError) -> bytes:
        """An error of the gateway's own in the release's form."""
        return erag.to_error(error)

    def to_upstream_error(self, answer: bytes) -> bytes:
        """An upstream's error in the release's form."""
        return erag.to_upstream_error(answer)

    def _shortened_passthrough(self, kind: BodyKind, shortened: bytes) -> Generator[None, None, dict[str, Any] | None]:
        """A long body without its long strings, if these suffice to see that it needs no translation; else None."""
        if kind in ("generate", "ask"):
            return None
        try:
            body = to_object(shortened)
        except BadRequest:
            return None
        yield
        if "" in (body.get("model"), body.get("previous_response_id")):
            return None  # perhaps emptied, but needed in full
        if kind == "chat" and not self._is_openai(body):
            return None  # a translation needs the full fields
        try:
            yield from self._check_in_steps(kind, body, shortened)
        except ForeignMedia:
            return None  # only the full body tells which URL is refused
        return body

    def _check(self, kind: BodyKind, body: dict[str, Any], content: bytes) -> None:
        """Raises BadRequest if a body exceeds a limit or holds media that are refused."""
        self.body_limits.check(body)
        if kind == "chat":
            if parts := media_urls.parts_of(body):
                self.body_limits.check_parts(parts)
                media_urls.check_any(parts, content, self.media_domains, self.body_limits.refuses_media_names)
        elif kind not in ("generate", "ask"):
            media_urls.check_any(body, content, self.media_domains, self.body_limits.refuses_media_names)

    def _check_in_steps(self, kind: BodyKind, body: dict[str, Any], content: bytes) -> Iterator[None]:
        """Like `_check`, in steps."""
        self.body_limits.check(body)
        looked_at: Any = media_urls.parts_of(body) if kind == "chat" else body
        if not looked_at or kind in ("generate", "ask"):
            return
        if kind == "chat":
            self.body_limits.check_parts(looked_at)
        yield
        names = self.body_limits.refuses_media_names
        yield from media_urls.check_in_steps(looked_at, content, self.media_domains, names)
        yield

    def _is_openai(self, body: dict[str, Any]) -> bool:
        """Whether a chat call is in OpenAI's form; raises BadRequest if it is in no known form."""
        if simplified.is_simplified(body):
            return False
        if not isinstance(body.get("messages"), list):
            raise BadRequest(
                "messages must be an object with system and user, a string, or OpenAI's array of messages, but it is "
                f"{kind_of(body.get('messages'))}.",
                param="messages",
            )
        return self.compat is None or not erag.is_of_release(body, self.compat)

    def _translate(self, kind: BodyKind, body: dict[str, Any]) -> tuple[str, Translation]:
        """The form and the translation of a body that is not vLLM's own."""
        if kind == "generate":
            return kind, prompts.from_generate(body, disable_streaming=self.disable_streaming)
        if kind == "ask":
            return kind, prompts.from_ask(body, self._max_context)
        request = simplified.from_body(
            body,
            self.stream_style,
            self.system_role,
            disable_streaming=self.disable_streaming,
            max_new_tokens=self.body_limits.max_new_tokens,
            counts_tokens=self.counts_tokens,
            checked=self.compat is not None,
            with_text=self.compat in ("erag-2.0", "erag-2.1"),
        )
        translation: simplified.Simplified | Flattened = (
            Flattened(request) if self.connector == "langchain" else request
        )
        return "simplified", erag.Released(translation, self.compat) if self.compat else translation

    def _max_context(self, model: str) -> int | float:
        return min(self.models.context(model), self.body_limits.max_new_tokens)


def _result(steps: Steps) -> Reading:
    """The result of these steps, all taken at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            reading: Reading = end.value
            return reading

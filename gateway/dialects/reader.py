"""Reads a request's body: what goes upstream of it, and the translation where its form is not vLLM's own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gateway.dialects import erag, media_urls, prompts, simplified
from gateway.dialects.body_limits import BodyLimits
from gateway.dialects.json_body import LONG_BODY, kind_of, to_object, without_long_strings
from gateway.dialects.langchain import Flattened
from gateway.dialects.text_stream import Style
from gateway.wire.errors import BadRequest, ModelNotFound, NoneReady
from gateway.wire.heads import AnswerHead
from gateway.wire.routes import BodyKind


class TranslatedStream(Protocol):
    """Makes the reply's stream, whose head is `head`, of the upstream's."""

    head: AnswerHead

    def feed(self, data: bytes) -> bytes:
        """What goes out for these bytes; raises GatewayError where they are not what was to come."""

    def failed(self, envelope: bytes) -> bytes:
        """What goes out last for an error of our own."""


class Translation(Protocol):
    """A checked request in a form that is not vLLM's: what `target` is asked, and how its answer goes back."""

    model: str | None
    streaming: bool

    @property
    def target(self) -> str: ...

    def to_call(self, model: str) -> bytes:
        """The upstream's body; raises BadRequest."""

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply; raises UpstreamBroken."""

    def to_stream(self) -> TranslatedStream | None:
        """None where the upstream's stream goes on as it is."""


class Models(Protocol):
    """The models that are served."""

    @property
    def models(self) -> tuple[str, ...]: ...

    def context(self, model: str) -> float: ...


# The body that goes upstream, unless there is a translation; form, model, streaming and translation. A plain tuple, as
# a class of its own would cost each request one call more.
Reading = tuple[bytes, str, str | None, bool, Translation | None]


@dataclass(frozen=True, slots=True)
class BodyReader:
    """How one gateway reads bodies; the fields go by their settings' names, `models` are those of its upstreams.

    `disable_streaming` answers every translated request whole, for whichever setting asks for that.
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

    def read(self, kind: BodyKind, content: bytes) -> Reading:
        """What a body of this kind is; raises GatewayError, which names the field.

        The form is `openai` where the bytes go upstream as they came, and `simplified`, `generate` or `ask` where
        there is a translation; empty where there is no body.
        """
        if kind == "none":
            return b"", "", None, False, None
        # If the shortened body is not conclusive, parse the full one.
        body = self._shortened_passthrough(kind, content) if len(content) >= LONG_BODY else None
        if body is None:
            body = to_object(content)
            if not self._is_passthrough(kind, body):
                form, translation = self._translate(kind, body)
                return b"", form, None, translation.streaming, translation
        model = body.get("model")
        return content, "openai", model if isinstance(model, str) else None, body.get("stream") is True, None

    def select_model(self, translation: Translation) -> str:
        """The model of a translated call: its own, the configured one or the first served. Raises GatewayError."""
        model, served = translation.model or self.model, self.models.models
        if model is None:
            if not served:
                raise NoneReady("No model server has answered yet: it may still be loading. Try again soon.")
            return served[0]
        if served and model not in served:
            raise ModelNotFound(f"The model {model[:200]!r} is not served; served: {', '.join(served)}.", param="model")
        return model

    def uses_erag_errors(self, kind: BodyKind, form: str) -> bool:
        """Whether an error is told in the release's words: that of a chat call that is not known to be OpenAI's."""
        return self.compat is not None and kind == "chat" and form != "openai"

    def to_error(self, message: str) -> bytes:
        """An error of our own in the release's words."""
        return erag.detail(message)

    def to_upstream_error(self, answer: bytes) -> bytes:
        """An upstream's error in the release's words."""
        return erag.to_error(answer)

    def _shortened_passthrough(self, kind: BodyKind, content: bytes) -> dict[str, Any] | None:
        """A long body without its long strings, if that is enough to see that it goes upstream as it came."""
        with contextlib.suppress(BadRequest):
            body = to_object(without_long_strings(content))
            if self._is_passthrough(kind, body) and body.get("model") != "":
                return body
        return None

    def _is_passthrough(self, kind: BodyKind, body: dict[str, Any]) -> bool:
        """Whether it is in the form that the upstream takes; raises BadRequest for what it must not have."""
        self.body_limits.check(body)
        if kind in ("generate", "ask"):
            return False
        if kind == "chat":
            media_urls.check_chat(body, self.media_domains)
            if simplified.is_simplified(body):
                return False
            if not isinstance(body.get("messages"), list):
                raise BadRequest(
                    "messages must be an object with system and user, a string, or OpenAI's array of messages, but "
                    f"it is {kind_of(body.get('messages'))}.",
                    param="messages",
                )
        else:
            media_urls.check_any(body, self.media_domains)
        return True

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
        )
        translation: simplified.Simplified | Flattened = (
            Flattened(request) if self.connector == "langchain" else request
        )
        return "simplified", erag.Released(translation, self.compat) if self.compat else translation

    def _max_context(self, model: str) -> float:
        return min(self.models.context(model), self.body_limits.max_new_tokens)

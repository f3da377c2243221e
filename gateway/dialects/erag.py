"""Requests, replies, streams and errors as a release of the replaced microservice had them; pure functions on values.

Faults of a release are not repeated: finish reasons and statuses are the true ones.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from gateway.dialects.langchain import Flattened
from gateway.dialects.simplified import Simplified
from gateway.dialects.streams import EVENTS_HEAD, ChunkStream, Style, TextStream
from gateway.wire import sse
from gateway.wire.errors import BadRequest, GatewayError, UpstreamBroken

Json = dict[str, Any]

Release = Literal["erag-1.4", "erag-2.0", "erag-2.1"]

# The default stream style of each release, and which of the flag's two names it read.
STYLES: dict[Release, Style] = {"erag-1.4": "repr", "erag-2.0": "repr", "erag-2.1": "openai"}
_FLAGS = {"erag-1.4": "streaming", "erag-2.0": "stream", "erag-2.1": "stream"}

# Fields that the releases checked but did not forward.
_NOT_SENT = ("top_k", "repetition_penalty")


class _Fields(BaseModel):
    """The fields that a release validated: numbers and flags were accepted as text, but not as null."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = None
    max_new_tokens: int = Field(1, gt=0, lt=2**63)  # JSON parsers accept no larger integer
    top_k: int = Field(1, gt=0)
    top_p: NonNegativeFloat = 0
    typical_p: NonNegativeFloat = 0
    temperature: NonNegativeFloat = 0
    repetition_penalty: NonNegativeFloat = 0
    input_guardrail_params: Json | None = None
    output_guardrail_params: Json | None = None
    data: Json | None = None


class _OldFields(_Fields):
    streaming: bool = True


class _NewFields(_Fields):
    stream: bool = True


_FIELDS: dict[Release, type[_Fields]] = {"erag-1.4": _OldFields, "erag-2.0": _NewFields, "erag-2.1": _NewFields}


class Unprocessable(BadRequest):
    """A body that the release did not accept: `details` has an object for each fault."""

    status = 422

    def __init__(self, details: list[Json], sent: bytes) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in details))
        self.details = details
        self.sent = sent


def is_of_release(body: Json, release: Release) -> bool:
    """Whether a body whose messages are a list has this release's form; otherwise it has OpenAI's."""
    return release != "erag-1.4" and not body.get("model")


def checked(body: Json, sent: bytes, release: Release, *, forward_sampling: bool) -> Json:
    """The body with each field as the release read it; fields that it did not forward only if `forward_sampling`.

    Raises Unprocessable, with the body as it was `sent`.
    """
    try:
        taken = _FIELDS[release].model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise Unprocessable([{**one, "loc": ("body", *one["loc"])} for one in details], sent) from None
    body = body | {name: getattr(taken, name) for name in taken.model_fields_set}
    # If two names contradict each other, the release knew only one of them.
    flag = _FLAGS[release]
    other = {"stream": "streaming", "streaming": "stream"}[flag]
    ignored = {other} if flag in body or not isinstance(body.get(other), bool) else set()
    if "max_new_tokens" in body:
        ignored |= {"max_tokens", "max_completion_tokens"}
    if not forward_sampling:
        ignored.update(_NOT_SENT)
    return {name: value for name, value in body.items() if name not in ignored}


def unprocessable(error: BadRequest, sent: bytes) -> Unprocessable:
    """An error in a body's form, as the release reported it."""
    place = error.param.replace("[", ".").replace("]", "").split(".") if error.param else []
    where = ["body", *(int(step) if step.isdigit() else step for step in place)]
    return Unprocessable([{"type": "value_error", "loc": where, "msg": error.message}], sent)


class Released:
    """A simplified request that is answered as the release answered it."""

    def __init__(self, request: Simplified | Flattened, release: Release) -> None:
        self.model = request.model
        self.streaming = request.streaming
        self.target = request.target
        self.to_call = request.to_call
        self._request = request
        self._release = release

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply, with the release's fields only; raises UpstreamBroken."""
        reply = orjson.loads(self._request.to_reply(answer))
        flag = _FLAGS[self._release]
        found = {name: reply.get(name) for name in ("id", "text", "prompt", flag)}
        if self._release != "erag-1.4":
            found["choices"] = list(map(_choice, reply["choices"]))
        found["output_guardrail_params"] = reply["output_guardrail_params"]
        found["data"] = {"reranked_docs": self._request.citations or []}
        return orjson.dumps(found)

    def to_stream(self) -> ReleasedStream:
        """The translator from vLLM's stream to the reply's."""
        cites = self._request.echoed["data"] is not None
        sources = {"reranked_docs": self._request.citations or []} if cites else None
        request = self._request
        hider = ChunkStream([], hides_usage=request.hides_usage)
        return ReleasedStream(request.to_texts(sources), hider, sources)


class ReleasedStream:
    """Sends events without comments, each in a write of its own, and after their end a line with the citations.

    `texts` translates vLLM's chunks; if it is None they are relayed, and `hider` may remove one of them. Comments are
    dropped: a router of those releases takes the bytes of one read for one event, and discards them unless they begin
    with `data:`.
    """

    head = EVENTS_HEAD
    paced = True

    def __init__(self, texts: TextStream | None, hider: ChunkStream, sources: Json | None) -> None:
        self._texts = texts
        self._hider = hider
        self._decoder = sse.Decoder(limit=1024 * 1024)
        self._sources = b"json: " + orjson.dumps(sources) + b"\n\n" if sources is not None else b""

    @property
    def fingerprint(self) -> bytes | None:
        """The fingerprint that `hider` holds."""
        return self._hider.fingerprint

    @fingerprint.setter
    def fingerprint(self, value: bytes | None) -> None:
        self._hider.fingerprint = value

    def feed(self, data: bytes) -> bytes:
        """The events for these bytes, and the line after the last one; raises UpstreamBroken if they are not events."""
        if self._texts is not None:
            return self._texts.feed(data)
        try:
            events = self._decoder.feed(self._hider.feed(data))
        except ValueError as error:
            raise UpstreamBroken("The model server's stream holds an event that is too large.") from error
        return b"".join(map(self._event, events))

    def _event(self, data: bytes) -> bytes:
        return sse.encode(data) + self._sources if data == sse.DONE else sse.encode(data)

    def comment(self, data: bytes) -> bytes:
        """Nothing."""
        return b""

    def failed(self, envelope: bytes) -> bytes:
        """An error as an event, and the end."""
        return (self._texts or self._hider).failed(envelope)


def to_upstream_error(answer: bytes) -> bytes:
    """vLLM's error in the releases' form: `{"detail": …}`."""
    try:
        error = orjson.loads(answer)["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (orjson.JSONDecodeError, LookupError, TypeError):
        said = answer.decode(errors="replace")
    return orjson.dumps({"detail": str(said)})


def to_error(error: GatewayError) -> bytes:
    """An error of the gateway's own in the releases' form; Unprocessable also holds the body that was sent."""
    if not isinstance(error, Unprocessable):
        return orjson.dumps({"detail": error.message})
    content = error.sent.removeprefix(BOM_UTF8)
    try:
        orjson.loads(content)
        sent: Any = orjson.Fragment(content)
    except orjson.JSONDecodeError:
        sent = content.decode(errors="replace") or None
    try:
        return orjson.dumps({"detail": error.details, "body": sent})
    except TypeError:  # a value is nested too deeply for orjson to write
        details = [{key: value for key, value in one.items() if key != "input"} for one in error.details]
        return orjson.dumps({"detail": details, "body": sent})


def _choice(choice: Json) -> Json:
    # A completion's choice has a text, a chat's choice a message.
    message = choice.get("message") or {"role": "assistant", "content": choice.get("text")}
    said = {"role": "assistant", "content": message.get("content"), "audio": None}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = calls
    return {
        "index": choice.get("index", 0),
        "message": said,
        "finish_reason": choice.get("finish_reason"),
        "metadata": None,
    }

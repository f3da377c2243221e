"""A vLLM whose answer is chosen by a word in the user's text, as the one was that the releases were recorded with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import orjson

from tests.support.fake_vllm import (
    DONE,
    RESET,
    STREAM_END,
    STREAM_HEAD,
    USAGE,
    FakeVllm,
    Received,
    Step,
    chunk,
    event,
    response,
)

_TEXTS = {
    "QUOTE": ["It's", ' a "q"\n', " café", " 😀", "\\n\t'x' \"y\""],
    "EMPTY": [],
    "ONE": ["one"],
}
_HELLO = ["Hel", "lo", " wor", "ld"]
_FINISH = {"LENGTH": "length", "TOOL": "tool_calls"}
_CALL = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_FIELDS = {"id": "cmpl-1", "object": "text_completion", "created": 1795215799, "model": "m"}
_STATUSES = {
    "E400": "400 Bad Request",
    "E401": "401 Unauthorized",
    "E404": "404 Not Found",
    "E422": "422 Unprocessable Entity",
    "E429": "429 Too Many Requests",
    "E500": "500 Internal Server Error",
    "E502": "502 Bad Gateway",
    "E503": "503 Service Unavailable",
}
_WORDS = (
    *_TEXTS,
    *_STATUSES,
    *("LENGTH", "LASTTEXT", "REASON", "TOOL", "NULL", "NOCHOICE", "KEEPALIVE", "HTML", "DROP", "DIE", "ERREVENT"),
)
_ERROR = {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}


class ScriptedVllm(FakeVllm):
    """The server; it serves a model that is called `m`."""

    def __init__(self) -> None:
        super().__init__(models=("m",))

    def answer_to(self, request: Received) -> Sequence[Step]:
        """As the word says, and `Hello world` in four pieces without one."""
        body = orjson.loads(request.body)
        completes = request.target == "/v1/completions"
        said = str(body.get("prompt") if completes else body.get("messages"))
        word = next((word for word in _WORDS if word in said), "")
        if word in _STATUSES:
            error = {"message": f"said {word}", "type": "X", "param": None, "code": int(word[1:])}
            return [response(_STATUSES[word], orjson.dumps({"error": error}))]
        if word == "HTML":
            return [response("502 Bad Gateway", b"<html>bad</html>", kind="text/html")]
        if word == "DROP":
            return [RESET]
        texts = _TEXTS.get(word, _HELLO)
        finish = _FINISH.get(word, "stop")
        if body.get("stream"):
            return list(_streamed(word, texts, finish, completes=completes))
        return [response("200 OK", orjson.dumps(_whole(word, texts, finish, body.get("n") or 1, completes=completes)))]


def _whole(word: str, texts: list[str], finish: str, count: int, *, completes: bool) -> dict[str, object]:
    text = None if word in ("NULL", "TOOL") else "".join(texts) + (" last" if word == "LASTTEXT" else "")
    choice: dict[str, object] = {"logprobs": None, "finish_reason": finish, "stop_reason": None}
    if completes:
        choice["text"] = text or ""
    else:
        calls = [_CALL] if word == "TOOL" else []
        reasoning = "think" if word == "REASON" else None
        choice["message"] = {"role": "assistant", "content": text, "tool_calls": calls, "reasoning": reasoning}
    choices = [] if word == "NOCHOICE" else [{"index": index, **choice} for index in range(count)]
    kind = "text_completion" if completes else "chat.completion"
    return {**_FIELDS, "object": kind, "choices": choices, "usage": USAGE}


def _text_event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return b"data: " + orjson.dumps({**_FIELDS, "choices": [choice]}) + b"\n\n"


def _streamed(word: str, texts: list[str], finish: str, *, completes: bool) -> list[Step]:
    steps: list[bytes] = []
    if not completes:
        steps.append(event({"role": "assistant", "content": ""}))
    extra = {
        "REASON": [event({"reasoning": "think"})],
        "TOOL": [event({"tool_calls": [{"index": 0, **_CALL}]})],
        "NULL": [event({"content": None})],
        "NOCHOICE": [event(None)],
    }
    steps += extra.get(word, [])
    pieces = [_text_event(text) if completes else event({"content": text}) for text in texts]
    if word in ("DIE", "ERREVENT"):
        pieces = pieces[:2]
    if word == "KEEPALIVE":
        pieces = list(itertools.chain.from_iterable((b": keep-alive\n\n", piece) for piece in pieces))
    if word != "TOOL":
        steps += pieces
    if word == "DIE":
        return [STREAM_HEAD, *map(chunk, steps), RESET]
    if word == "ERREVENT":
        steps.append(b"data: " + orjson.dumps(_ERROR) + b"\n\n")
    else:
        last = " last" if word == "LASTTEXT" else ""
        steps.append(
            _text_event(last, finish) if completes else event({} if word == "TOOL" else {"content": last}, finish)
        )
    return [STREAM_HEAD, *map(chunk, [*steps, DONE]), STREAM_END]

"""Checks a line of a batch's input, in OpenAI's form, and turns it into the request for it."""

from __future__ import annotations

import base64
import binascii
import re
from hashlib import blake2b
from typing import Any, NamedTuple

import httpx
import orjson

from gateway.dialects.json_body import kind_of, shown
from gateway.wire.near_paths import NearPaths
from gateway.wire.routes import RESPONSE_ID, ROUTES, Route

Json = dict[str, Any]

_BY_PATH = {path: [route for route in ROUTES if route.path == path] for path in {route.path for route in ROUTES}}
_NEAR = NearPaths(_BY_PATH)
_DATA_URL = re.compile(r"data:([\w.+-]+/([\w.+-]+))?(?:;[\w.+=-]+)*;base64,")


class BadLine(Exception):
    """A line is wrong; the text is the end of a sentence that begins with the line's number."""


class Request(NamedTuple):
    """The request for a line; `kind` is the content type, None if there is no content."""

    custom_id: str
    method: str
    path: str
    content: bytes
    kind: str | None


def digest_of(custom_id: str) -> bytes:
    """The digest of an id, kept instead of the id: fifty thousand ids may be long."""
    return blake2b(custom_id.encode(), digest_size=16).digest()


def to_request(line: bytes, model: str | None) -> Request:
    """The request for a line of JSON; `model`, if given, replaces the line's model. Raises BadLine."""
    told = _object(line)
    custom_id = told.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine(f"needs a custom_id, a text that no other line has, but that is {_told(custom_id)}")
    route = _route_of(told)
    body = told.get("body")
    if route.body == "none":
        if body:
            raise BadLine(f"has a body, which GET {route.path} does not take")
        return Request(custom_id, route.method, told["url"], b"", None)
    if not isinstance(body, dict):
        raise BadLine(f"needs a body, an object as {route.path} takes it, but that is {_told(body)}")
    for name in ("stream", "streaming"):
        if body.get(name) not in (None, False):
            raise BadLine(f"asks for a stream, but a batch has whole answers: leave {name} out")
    if model is not None:
        body["model"] = model
    if route.body == "upload":
        return Request(custom_id, route.method, route.path, *_upload(body))
    if route.body == "chat" and "stream" not in body and "streaming" not in body:
        # The default of the simplified form is to stream.
        body["stream"] = False
    return Request(custom_id, route.method, told["url"], orjson.dumps(body), "application/json")


def _object(line: bytes) -> Json:
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError:
            raise BadLine("is not UTF-8: save the file as UTF-8") from None
        raise BadLine(f"is no JSON, from its character {error.pos + 1} on: {error.msg}") from None
    if not isinstance(told, dict):
        raise BadLine(
            f"is {shown(told)}: a line is an object, with custom_id, method, url and body, as OpenAI's batches have it"
        )
    return told


def _route_of(told: Json) -> Route:
    """The route that a line names."""
    method, url = told.get("method"), told.get("url")
    if not isinstance(url, str):
        raise BadLine(f"needs a url, as /v1/chat/completions, but that is {_told(url)}")
    words = url.split("/")
    path = "/".join("{response_id}" if RESPONSE_ID.fullmatch(word) else word for word in words)
    routes = _BY_PATH.get(path)
    if routes is None or "{" in url:
        near = _NEAR.nearest(url)
        hint = f": did you mean {near}?" if near else ", as /v1/chat/completions is; docs/api.md lists them"
        raise BadLine(f"has the url {shown(url)}, which is no path of a gateway's{hint}")
    for route in routes:
        if route.method == method:
            return route
    takes = " or ".join(route.method for route in routes)
    raise BadLine(f"needs the method {takes}, which {route.path} takes, but that is {_told(method)}")


def _upload(body: Json) -> tuple[bytes, str]:
    """The form for a body whose `file_url` holds the file, as in vLLM's own batches; and the form's content type."""
    fields = dict(body)
    url = fields.pop("file_url", None)
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None:
        raise BadLine("needs a file_url, which begins with data:audio/wav;base64, or the like and has the file itself")
    try:
        file = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadLine("has a file_url that is not in base64") from None
    form: Json = {}
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if not all(isinstance(one, str | int | float) for one in values):
            raise BadLine(f"has a field {shown(name)}, which a form cannot have: it has texts, numbers, lists of them")
        form[f"{name}[]" if isinstance(value, list) else name] = value
    named = (f"audio.{found[2] or 'bin'}", file, found[1] or "application/octet-stream")
    built = httpx.Request("POST", "http://gateway", data=form, files={"file": named})
    return built.read(), built.headers["content-type"]


def _told(value: Any) -> str:
    return shown(value) if value is not None else kind_of(value)

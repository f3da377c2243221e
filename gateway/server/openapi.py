"""The OpenAPI description of the gateway, made from the list of routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from gateway.dialects.streams import Style
from gateway.wire.routes import RESPONSE_ID, Route

Json = dict[str, Any]

_TEXT = {"type": "string", "pattern": "\\S"}
_PROMPT = {"type": "string", "minLength": 1}
_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
}
_MESSAGE = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}
_FROM_USER = {"type": "object", "properties": {"role": {"const": "user"}}, "required": ["role"]}
_SIMPLIFIED = {
    "type": "object",
    "description": "The simplified form: what a pipeline knows, and any field that vLLM's chat completions know.",
    "properties": {
        "messages": {
            "description": "What is asked. A list of OpenAI's messages makes the call simplified only together with "
            "`max_new_tokens`, `streaming`, `data` or a guardrail's parameters.",
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "id": {"description": "Of the class that it was in the systems that this replaces."},
                        "system": {"type": ["string", "null"]},
                        "user": {"anyOf": [_TEXT, _PARTS]},
                    },
                    "required": ["user"],
                    "additionalProperties": False,
                },
                _TEXT,
                {"type": "array", "items": _MESSAGE, "contains": _FROM_USER},
                {"type": "null"},
            ],
        },
        "query": {"description": "The user's text, where there is no `messages`."},
        "max_new_tokens": {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": 2**31 - 1,
            "default": 1024,
            "description": "Or `max_tokens`.",
        },
        "streaming": {"type": ["boolean", "null"], "default": True, "description": "Or `stream`."},
        "temperature": {"type": ["number", "null"], "minimum": 0, "default": 0.01},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "default": 0.95},
        "model": {
            "type": ["string", "null"],
            "description": "Any that the model server may know; else the configured one, or the first that can chat.",
        },
        "stream_style": {"enum": [*get_args(Style), None], "description": "How the stream looks."},
        "data": {
            "type": ["object", "null"],
            "description": "Given back with the reply; of `reranked_docs`, what they cite.",
        },
        "output_guardrail_params": {"description": "Given back with the reply."},
    },
    "anyOf": [
        {"required": ["messages"], "properties": {"messages": {"not": {"type": "null"}}}},
        {"required": ["query"], "properties": {"messages": {"type": "null"}, "query": _TEXT}},
    ],
}
_CHAT = {
    "type": "object",
    "description": "OpenAI's form, which goes to vLLM as it came: what is in it is vLLM's to judge.",
    "properties": {"messages": {"type": "array"}},
    "required": ["messages"],
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
                "request_id": {"type": "string"},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_BARE = {
    "generate": {
        "type": "object",
        "properties": {"prompt": _PROMPT, "stream": {"type": ["boolean", "null"]}},
        "required": ["prompt"],
    },
    "ask": {"type": "object", "properties": {"question": _PROMPT}, "required": ["question"]},
}
_UPLOAD = {"type": "object", "description": "vLLM's own fields: file, model, language, stream and others."}
_OWN = {
    "/health": "This process answers.",
    "/v1/health_check": "200 when a call would succeed now, else 503, with each upstream's state.",
    "/ping": "200 when a call would succeed, 204 while the model server loads, else 503.",
    "/v1/statistics": "How long the last chat calls took, in seconds.",
    "/metrics": "Prometheus.",
    "/openapi.json": "This description.",
}
# The path of a single model, which vLLM lacks.
MODEL = "/v1/models/{model}"
_MODEL = {
    "summary": "One of them, by its id.",
    "tags": ["models"],
    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
    "responses": {
        "200": {"description": "As in the list.", "content": {"application/json": {"schema": {}}}},
        "default": {
            "description": "An error: there is no such model, or no model server is up.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        },
    },
}
_PAGE = {
    "/": "A page to talk from and to watch.",
    "/v1/status": "How the gateway and its upstreams are, and were in the last five minutes.",
    "/v1/status/stream": "The same as server-sent events, one a second; only the first has the last five minutes.",
}


def describe(relayed: Sequence[Route], *, page: bool) -> Json:
    """OpenAPI 3.1: the `relayed` routes, with vLLM's own requests and responses, and the gateway's routes.

    `page` says whether the page and its status endpoints are served.
    """
    paths: dict[str, Json] = {}
    for route in relayed:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    if any(route.name == "models" for route in relayed):
        paths[MODEL] = {"get": _MODEL}
    for path, about in {**_OWN, **(_PAGE if page else {})}.items():
        paths[path] = {"get": {"summary": about, "responses": {"200": {"description": "As it says."}}}}
    for path in ("/v1/health_check", "/ping"):
        paths[path]["get"]["responses"]["503"] = {"description": "No call would succeed now."}
    paths["/ping"]["get"]["responses"]["204"] = {"description": "The model server loads."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-gateway", "version": "1", "description": "A thin gateway in front of vLLM."},
        "paths": paths,
        "components": {"schemas": {"Simplified": _SIMPLIFIED, "Chat": _CHAT, "Error": _ERROR}},
    }


def _operation(route: Route) -> Json:
    answer: Json = {} if route.body == "ask" else {"application/json": {"schema": {}}}
    if route.body == "generate":
        answer["*/*"] = {"schema": {"type": "string"}, "example": '{"text": ["Once upon"]}\0'}  # it has no type
    elif route.streams:
        answer["text/event-stream"] = {}
    operation: Json = {
        "summary": route.about,
        "tags": [route.name],
        "responses": {
            "200": {"description": "The answer: vLLM's, but where the call was translated.", "content": answer},
            "default": {
                "description": "An error: vLLM's as it wrote it, or the gateway's.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if "{response_id}" in route.path:
        name = {"type": "string", "pattern": f"^{RESPONSE_ID.pattern}$"}
        operation["parameters"] = [{"name": "response_id", "in": "path", "required": True, "schema": name}]
        if route.streams:
            operation["parameters"] += [
                {"name": "stream", "in": "query", "schema": {"type": "boolean"}},
                {"name": "starting_after", "in": "query", "schema": {"type": "integer"}},
            ]
    if route.body == "upload":
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    elif route.body != "none":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(route)}}}
    return operation


def _body(route: Route) -> Json:
    if route.body == "chat":
        return {"anyOf": [{"$ref": "#/components/schemas/Simplified"}, {"$ref": "#/components/schemas/Chat"}]}
    return _BARE.get(route.body, {"type": "object", "description": "vLLM's own fields."})

"""Makes calls with OpenAI's and Anthropic's clients and says what comes of each; run by the clients' Python.

A line of its input is a call, `{"client", "url", "retries", "call"}`; one of its output is what that got: the text so
far, and the class of the error, its status and what it says.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic
import openai


def with_openai(url: str, retries: int, call: dict[str, Any], got: list[str]) -> None:
    """Collects the text of an answer in `got`."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=20)
    answer = client.chat.completions.create(**call)
    if not call.get("stream"):
        got.append(answer.choices[0].message.content)
        return
    for chunk in answer:
        got.append(chunk.choices[0].delta.content or "")


def with_responses(url: str, retries: int, call: dict[str, Any], got: list[str]) -> None:
    """Collects the types of a stream's events in `got`."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=20)
    for event in client.responses.create(stream=True, **call):
        got.append(event.type)


def with_anthropic(url: str, retries: int, call: dict[str, Any], got: list[str]) -> None:
    """Collects the types of a stream's events, or the text of an answer, in `got`."""
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=retries, timeout=20)
    answer = client.messages.create(**call)
    if not call.get("stream"):
        got.append(answer.content[0].text)
        return
    for event in answer:
        got.append(event.type)


CLIENTS = {"openai": with_openai, "responses": with_responses, "anthropic": with_anthropic}


def outcome(client: str, url: str, retries: int, call: dict[str, Any]) -> dict[str, Any]:
    got: list[str] = []
    try:
        CLIENTS[client](url, retries, call, got)
    except (openai.APIError, anthropic.APIError) as error:
        answer = getattr(error, "response", None)
        return {
            "got": got,
            "error": type(error).__name__,
            "message": error.message,
            "param": getattr(error, "param", None),
            "status": getattr(error, "status_code", None),
            "request id": answer and answer.headers.get("x-request-id"),
            "retry after": answer and answer.headers.get("retry-after"),
        }
    return {"got": got, "error": None, "status": None}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(outcome(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

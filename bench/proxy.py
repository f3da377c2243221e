"""The plain proxy that one would write first: a Starlette route, an httpx client, a streamed response."""

from __future__ import annotations

import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


def create_app(upstream: str) -> Starlette:
    """A relay of chat completions."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    client = httpx.AsyncClient(base_url=upstream, limits=limits, timeout=None, trust_env=False)

    async def chat(request: Request) -> Response:
        headers = {"content-type": "application/json"}
        call = client.build_request("POST", "/v1/chat/completions", content=await request.body(), headers=headers)
        answer = await client.send(call, stream=True)
        kind = answer.headers["content-type"]
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, media_type=kind, background=BackgroundTask(answer.aclose)
        )

    async def health(request: Request) -> Response:
        return Response()

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health)])


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)

"""A model server that takes any call and does as its text says: `hold:MS` before the answer, or `flood` without end.

`python -m tests.heavy.abuse.upstream MODEL` prints its port. It keeps nothing of what it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys

import click
import uvloop

from tests.support.fake_vllm import DONE, EVENTS, STREAM_END, STREAM_HEAD, chunk, completion, event, response

# How long it takes to a first token, from one to the next, and from one of a flood to the next, in seconds.
FIRST, NEXT, FLOOD = 0.005, 0.002, 0.01
_FLOOD = chunk(event({"content": "x" * 20_000}))
_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model","max_model_len":40960}]}' % sys.argv[1].encode()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # uvloop raises a RuntimeError where the other side has gone.
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, RuntimeError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            beginning, stream = await _body(reader, head)
            if not head.startswith(b"POST") or b"/tokenize" in head:
                writer.write(response("200 OK", _MODELS))
                continue
            await _answer(beginning, stream, writer)
    writer.transport.abort()


async def _body(reader: asyncio.StreamReader, head: bytes) -> tuple[bytes, bool]:
    """How the body begins, and whether it asks for a stream."""
    beginning, stream = b"", False
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    left = int(length[1]) if length else 0
    while left:
        piece = await reader.read(min(left, 1 << 16))
        if not piece:
            raise ConnectionError
        left -= len(piece)
        beginning = beginning or piece[:4096]
        stream = stream or b'"stream":true' in piece
    return beginning, stream


async def _answer(body: bytes, stream: bool, writer: asyncio.StreamWriter) -> None:
    held = re.search(rb"hold:(\d+)", body)
    await asyncio.sleep(int(held[1]) / 1000 if held else FIRST)
    if not stream:
        writer.write(response("200 OK", completion()))
        return
    writer.write(STREAM_HEAD)
    while b"flood" in body:
        writer.write(_FLOOD)
        await writer.drain()
        await asyncio.sleep(FLOOD)
    for one in EVENTS[:-1]:
        writer.write(chunk(one))
        await asyncio.sleep(NEXT)
    writer.write(chunk(DONE) + STREAM_END)


async def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    # It is another machine's memory that a model server's sending takes, and of thousands of streams all that there is.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    server = await asyncio.start_server(serve, sock=listener, backlog=4096)
    click.echo(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "other":
        os.nice(10)  # a hostile client's, which nobody honest is to wait for
    uvloop.run(main())

"""Begins a long answer with one of the clients and leaves it when told, at each address in turn: leave.py CLIENT URL...

Run by the clients' Python. Prints a line once it has begun, leaves at a line of its input and prints another; then it
waits for one more line, so that it is not its own end that closes the connection.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

MODEL = "demo-model"
ASK = [{"role": "user", "content": "What is vLLM?"}]
# Goes on for some thousand tokens, whatever the model thinks of it.
ENDLESS: dict[str, Any] = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
Leave = Callable[[], object]


def _loop() -> asyncio.AbstractEventLoop:
    """One that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def openai_stream(url: str) -> Leave:
    from openai import OpenAI

    chat = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions
    stream = chat.create(model=MODEL, messages=ASK, stream=True, **ENDLESS)
    next(stream)
    close: Leave = stream.close
    return close


def openai_task(url: str) -> Leave:
    from openai import AsyncOpenAI

    async def call() -> None:
        await AsyncOpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
            model=MODEL, messages=ASK, **ENDLESS
        )

    return asyncio.run_coroutine_threadsafe(call(), _loop()).cancel


def openai_timeout(url: str) -> Leave:
    from openai import APITimeoutError, OpenAI

    def call() -> None:
        try:
            chat = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=6).chat.completions
            chat.create(model=MODEL, messages=ASK, **ENDLESS)
        except APITimeoutError:
            return
        raise AssertionError("it was answered in time")

    thread = threading.Thread(target=call)
    thread.start()
    return thread.join


def openai_responses(url: str) -> Leave:
    from openai import OpenAI

    responses = OpenAI(base_url=f"{url}/v1", api_key="none").responses
    stream = responses.create(
        model=MODEL, input="What is vLLM?", stream=True, max_output_tokens=4000, extra_body={"ignore_eos": True}
    )
    while next(stream).type != "response.output_text.delta":
        continue
    close: Leave = stream.close
    return close


def anthropic_stream(url: str) -> Leave:
    from anthropic import Anthropic

    # This call of vLLM's has no ignore_eos.
    long = {"type": "json_schema", "schema": {"type": "array", "items": {"enum": ["Rome"]}, "minItems": 5000}}
    messages = Anthropic(base_url=url, api_key="none").messages
    stream = messages.create(
        model=MODEL, messages=ASK, stream=True, max_tokens=4000, extra_body={"output_config": {"format": long}}
    )
    next(stream)
    close: Leave = stream.close
    return close


def langchain(url: str) -> Leave:
    from langchain_openai import ChatOpenAI

    stream = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=MODEL, **ENDLESS).stream("What is vLLM?")
    next(stream)
    close: Leave = stream.close
    return close


def llama_index(url: str) -> Leave:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    # A stream of its that is not asynchronous is closed only when the garbage collector finds it.
    begun = threading.Event()

    async def read() -> None:
        llm = OpenAILike(
            api_base=f"{url}/v1", api_key="none", model=MODEL, is_chat_model=True, additional_kwargs=ENDLESS
        )
        async for _ in await llm.astream_chat([ChatMessage(role="user", content="What is vLLM?")]):
            begun.set()

    task = asyncio.run_coroutine_threadsafe(read(), _loop())
    begun.wait(60)
    return task.cancel


def litellm(url: str) -> Leave:
    from litellm import acompletion

    # What it gives where it is not asynchronous has no way to close it.
    async def begin() -> Any:
        stream = await acompletion(
            model=f"hosted_vllm/{MODEL}", api_base=f"{url}/v1", api_key="none", messages=ASK, stream=True, **ENDLESS
        )
        await anext(stream)
        return stream

    loop = _loop()
    stream = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    return lambda: asyncio.run_coroutine_threadsafe(stream.aclose(), loop).result()


CLIENTS = {
    begin.__name__: begin
    for begin in (
        *(openai_stream, openai_task, openai_timeout, openai_responses),
        *(anthropic_stream, langchain, llama_index, litellm),
    )
}


def main() -> None:
    _, client, *urls = sys.argv
    for url in urls:
        leave = CLIENTS[client](url)
        print("begun", flush=True)
        sys.stdin.readline()
        leave()
        print("left", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()

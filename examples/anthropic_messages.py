"""Anthropic's client: how long a message is, an answer, and one that is streamed.

pip install anthropic
python examples/anthropic_messages.py
"""

import os

from anthropic import Anthropic

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")
ASK = [{"role": "user", "content": "What is vLLM?"}]

client = Anthropic(base_url=BASE_URL, api_key="none")

print(client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens, "tokens")

# The client itself knows no temperature.
message = client.messages.create(model=MODEL, messages=ASK, max_tokens=64, extra_body={"temperature": 0})
print(message.content[0].text)

ask = [{"role": "user", "content": "Who are you?"}]
with client.messages.stream(model=MODEL, messages=ask, max_tokens=64, extra_body={"temperature": 0}) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()

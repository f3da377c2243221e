"""A chat with OpenAI's client, whole and then streamed.

pip install openai
python examples/openai_chat.py
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

answer = client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "What is vLLM?"}], temperature=0
)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "Who are you?"}], temperature=0, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

"""OpenAI's Responses, whole and then streamed.

pip install openai
python examples/openai_responses.py
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

response = client.responses.create(model=MODEL, input="What is vLLM?", temperature=0)
print(response.output_text)

for event in client.responses.create(model=MODEL, input="Who are you?", temperature=0, stream=True):
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
print()

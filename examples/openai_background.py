"""A response that is made in the background and asked for later, and one that is cancelled, with OpenAI's client.

pip install openai
python examples/openai_background.py

vLLM stores responses where it was started so (VLLM_ENABLE_RESPONSES_API_STORE=1 make up), each server its own: this
needs a gateway with one upstream.
"""

import os
import time

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

response = client.responses.create(model=MODEL, input="What is vLLM?", temperature=0, background=True, store=True)
while response.status in ("queued", "in_progress"):
    time.sleep(0.2)
    response = client.responses.retrieve(response.id)
print(response.status, response.output_text)

story = client.responses.create(model=MODEL, input="Tell me a story.", background=True, store=True)
print(client.responses.cancel(story.id).status)

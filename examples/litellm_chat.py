"""LiteLLM as a client: an answer, and one that is streamed.

pip install litellm
LITELLM_LOCAL_MODEL_COST_MAP=True python examples/litellm_chat.py

The variable keeps LiteLLM from asking the internet for price lists at its start.
"""

import os

from litellm import completion

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")
SERVER = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{BASE_URL}/v1", "api_key": "none"}

answer = completion(**SERVER, messages=[{"role": "user", "content": "What is vLLM?"}], temperature=0)
print(answer.choices[0].message.content)

stream = completion(**SERVER, messages=[{"role": "user", "content": "Who are you?"}], temperature=0, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

"""A stream that is left in the middle, with OpenAI's client: the server stops generating at once.

pip install openai
python examples/openai_leave.py
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

said = ""
with client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "Tell me a story."}], temperature=0, stream=True
) as stream:
    for chunk in stream:
        said += chunk.choices[0].delta.content or ""
        if "." in said:
            break  # the end of the `with` closes the connection
print(said)

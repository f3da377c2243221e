"""The models that are served, and a text that one of them completes, with OpenAI's client.

pip install openai
python examples/openai_completions.py
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

models = [model.id for model in client.models.list()]
print(models)

completion = client.completions.create(model=models[0], prompt="What is Deep Learning?", max_tokens=64, temperature=0)
print(completion.choices[0].text.strip())

stream = client.completions.create(model=models[0], prompt="Who are you?", max_tokens=64, temperature=0, stream=True)
for chunk in stream:
    print(chunk.choices[0].text, end="", flush=True)
print()

"""A tool that the model is made to call, with OpenAI's client; the server constrains the arguments to its schema.

pip install openai
python examples/openai_tools.py

vLLM needs a `--tool-call-parser` that fits the model (EXTRA_ARGS="--tool-call-parser hermes" make up), and where the
model is to choose by itself (`tool_choice="auto"`), `--enable-auto-tool-choice`.
"""

import json
import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            # Not needed by a model that knows when to end.
            "enum": [{"city": "Paris"}, {"city": "Rome"}],
        },
    },
}

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")

answer = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "What is the weather in Rome?"}],
    tools=[WEATHER],
    tool_choice={"type": "function", "function": {"name": "weather"}},
    temperature=0,
)
for call in answer.choices[0].message.tool_calls:
    print(call.function.name, json.loads(call.function.arguments))

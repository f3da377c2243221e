"""LangChain's ChatOpenAI: an answer, one that is streamed, and a stream that is left.

pip install langchain-openai
python examples/langchain_chat.py
"""

import os

from langchain_openai import ChatOpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

chat = ChatOpenAI(base_url=f"{BASE_URL}/v1", api_key="none", model=MODEL, temperature=0)

print(chat.invoke([("system", "Answer in one sentence."), ("user", "What is vLLM?")]).text)

for chunk in chat.stream("Who are you?"):
    print(chunk.text, end="", flush=True)
print()

stream = chat.stream("Tell me a story.")
for chunk in stream:
    print(chunk.text, end="", flush=True)
    if "." in chunk.text:
        stream.close()  # the server stops generating
        break
print()

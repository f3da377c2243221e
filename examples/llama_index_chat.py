"""LlamaIndex's OpenAILike: an answer, and one that is streamed.

pip install llama-index-llms-openai-like
python examples/llama_index_chat.py
"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
MODEL = os.environ.get("MODEL", "demo-model")

llm = OpenAILike(api_base=f"{BASE_URL}/v1", api_key="none", model=MODEL, is_chat_model=True, temperature=0)

answer = llm.chat([ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="What is vLLM?")])
print(answer.message.content)

for piece in llm.stream_chat([ChatMessage(role="user", content="Who are you?")]):
    print(piece.delta, end="", flush=True)
print()

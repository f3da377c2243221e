"""Answers a question from this repository's documents: BM25 finds passages, the model answers, its sources follow.

pip install bm25s httpx
python examples/rag.py "What is RAG?"
"""

import json
import os
import re
import sys
from pathlib import Path

import bm25s
import httpx

BASE_URL = os.environ.get("BASE_URL", "http://localhost:9000")
REPOSITORY = Path(__file__).parent.parent
INSTRUCTION = (
    "### You are a helpful, respectful and honest assistant. Answer the question from the search results, which come "
    "from the local knowledge base. Ignore what is not relevant to the question. If you do not know the answer, say so."
)


def passages() -> list[dict]:
    """Each document by its headings, with where it is from."""
    found = []
    for path in [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]:
        for section in re.split(r"^(?=## )", path.read_text(), flags=re.MULTILINE):
            heading = section.splitlines()[0].lstrip("# ")
            url = f"{path.relative_to(REPOSITORY)}#{re.sub(r'[^a-z0-9 -]', '', heading.lower()).replace(' ', '-')}"
            found.append({"text": section[:1500], "metadata": {"url": url}})
    return found


def retrieve(question: str, count: int = 3) -> list[dict]:
    """The passages that fit the question best, best first."""
    documents = passages()
    retriever = bm25s.BM25()
    retriever.index(
        bm25s.tokenize([document["text"] for document in documents], show_progress=False), show_progress=False
    )
    query = bm25s.tokenize(question, show_progress=False)
    (best,), (scores,) = retriever.retrieve(query, documents, k=count, show_progress=False)
    for number, (document, score) in enumerate(zip(best, scores, strict=True), 1):
        document["metadata"] |= {"reranker_score": float(score), "citation_id": number}
    return list(best)


def ask(question: str, documents: list[dict]) -> None:
    """Prints the answer as it comes, and then what it cites."""
    results = "\n\n".join(document["text"] for document in documents)
    call = {
        "messages": {
            "system": f"{INSTRUCTION} ### Search results: {results} \n\n",
            "user": f"### Question: {question} \n\n",
        },
        "max_new_tokens": 256,
        "streaming": True,
        "data": {"reranked_docs": documents},
    }
    with httpx.stream("POST", f"{BASE_URL}/v1/chat/completions", json=call, timeout=300) as answer:
        if answer.is_error:
            sys.exit(answer.read().decode())
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                sys.exit(f"\nThe answer broke off: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
            # The last chunk has no choices, but what the answer cites.
            for number, source in enumerate(chunk.get("data", {}).get("reranked_docs", [])):
                print("" if number else "\n\n", end="")
                print(f"[{source['citation_id']}] {source['url']} ({source['reranker_score']:.2f})")


question = " ".join(sys.argv[1:]) or "What is RAG?"
ask(question, retrieve(question))

"""The sources of a RAG pipeline's answer: the retriever's documents in, what the reply cites of them out.

A document is `{"text": …, "metadata": {…}}`; its metadata say where it is from, by `url`, or by
`bucket_name` and `object_name`, and may hold `vector_distance`, `reranker_score` and `citation_id`.
"""

from __future__ import annotations

from typing import Any

from gateway.wire.errors import BadRequest

Json = dict[str, Any]

_SCORES = {"vector_distance": 1.0, "reranker_score": 0.0, "citation_id": 0}


def cited(data: Json) -> Json:
    """What goes back of a request's `data`: each reranked document as its citation; raises BadRequest."""
    documents = data.get("reranked_docs")
    if documents is None:
        return data
    if not isinstance(documents, list):
        raise BadRequest("data.reranked_docs must be an array of documents.", param="data.reranked_docs")
    return {**data, "reranked_docs": [_citation(document, number) for number, document in enumerate(documents)]}


def _citation(document: Any, number: int) -> Json:
    metadata = document.get("metadata") if isinstance(document, dict) else None
    name = f"data.reranked_docs[{number}].metadata"
    if not isinstance(metadata, dict):
        raise BadRequest(f"{name} must be an object.", param=name)
    if metadata.get("url"):
        source = {"type": "link", "url": metadata["url"]}
    elif metadata.get("bucket_name") and metadata.get("object_name"):
        source = {"type": "file", "bucket_name": metadata["bucket_name"], "object_name": metadata["object_name"]}
    else:
        raise BadRequest(f"{name} must hold url, or bucket_name and object_name.", param=name)
    return source | {score: metadata.get(score, default) for score, default in _SCORES.items()}

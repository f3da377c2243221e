"""The sources of a RAG pipeline's answer: turns the retriever's documents into the reply's citations.

A document is `{"text": …, "metadata": {…}}`. Its metadata name its origin by `url`, by `bucket_name` and
`object_name`, or by `source`, as LangChain's loaders do. They may hold `vector_distance`, `reranker_score` and
`citation_id`, as numbers or as numbers in text.
"""

from __future__ import annotations

import math
from typing import Any

from gateway.dialects.json_body import shown
from gateway.wire.errors import Rejected

Json = dict[str, Any]

_SCORES: dict[str, tuple[type[float] | type[int], float]] = {
    "vector_distance": (float, 1.0),
    "reranker_score": (float, 0.0),
    "citation_id": (int, 0),
}


def cited(data: Json, *, with_text: bool) -> list[Json]:
    """The citations of `data.reranked_docs`, each with its document's text if asked for; raises Rejected."""
    documents = data.get("reranked_docs")
    if not documents:
        return []
    if not isinstance(documents, list):
        raise Rejected("data.reranked_docs must be an array of documents.", param="data.reranked_docs")
    return [_citation(document, number, with_text) for number, document in enumerate(documents)]


def _citation(document: Any, number: int, with_text: bool) -> Json:
    name = f"data.reranked_docs[{number}]"
    if not isinstance(document, dict):
        raise Rejected(f"{name} must be an object with text and metadata.", param=name)
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise Rejected(f"{name}.metadata must be an object.", param=f"{name}.metadata")
    text: Json = {}
    if with_text:
        text["text"] = document.get("text")
        if not isinstance(text["text"], str):
            raise Rejected(f"{name}.text must be a string.", param=f"{name}.text")
    scores = {score: _number(metadata, score, f"{name}.metadata.{score}") for score in _SCORES}
    return text | _source(metadata, f"{name}.metadata") | scores


def _source(metadata: Json, name: str) -> Json:
    """The document's origin."""
    if metadata.get("url") is not None:
        return {"type": "link", "url": _string(metadata, "url", name)}
    if metadata.get("bucket_name") is not None and metadata.get("object_name") is not None:
        return {"type": "file", **{key: _string(metadata, key, name) for key in ("bucket_name", "object_name")}}
    if metadata.get("source") is None:
        raise Rejected(f"{name} must hold url, bucket_name and object_name, or source.", param=name)
    source = _string(metadata, "source", name)
    if source.lower().startswith(("http://", "https://")):
        return {"type": "link", "url": source}
    return {"type": "file", "source": source}


def _string(metadata: Json, key: str, name: str) -> str:
    value = metadata[key]
    if not isinstance(value, str):
        raise Rejected(f"{name}.{key} must be a string, but it is {shown(value)}.", param=f"{name}.{key}")
    return value


def _number(metadata: Json, score: str, name: str) -> float:
    kind, default = _SCORES[score]
    value = metadata.get(score, default)
    number = math.nan
    try:
        if isinstance(value, (int, float, str)):
            number = float(value)
    except (ValueError, OverflowError):
        pass
    whole = kind is float or number.is_integer()
    if not math.isfinite(number) or not whole:
        wanted = "a number" if kind is float else "an integer"
        raise Rejected(f"{name} must be {wanted}, but it is {shown(value)}.", param=name)
    return kind(number)

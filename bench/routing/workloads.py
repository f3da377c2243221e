"""What is asked of the servers: chat calls as bytes, when they come, and the blocks that vLLM would cut them into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import orjson

MODEL = "model"
BLOCK = 16
_CHARACTERS = 4  # of a token


@dataclass(frozen=True, slots=True)
class Call:
    """When it comes, its body, its prompt's tokens and whole blocks, and the tokens of its answer."""

    at: float
    body: bytes
    tokens: int
    blocks: tuple[int, ...]
    answer: int


def chat_call(at: float, texts: list[str], answer: int) -> Call:
    """A system text and then a user's and an assistant's by turns, streamed."""
    roles = ["system", *(("assistant", "user")[number % 2] for number in range(1, len(texts)))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, texts, strict=True)]
    prompt = "".join(texts)
    return Call(
        at,
        orjson.dumps({"model": MODEL, "stream": True, "max_tokens": answer, "messages": messages}),
        len(prompt) // _CHARACTERS,
        blocks_of(prompt),
        answer,
    )


def blocks_of(prompt: str) -> tuple[int, ...]:
    """One number for each whole block and all that is before it."""
    length = BLOCK * _CHARACTERS
    parts = (prompt[begin : begin + length] for begin in range(0, len(prompt) - length + 1, length))
    return tuple(accumulate(parts, lambda before, part: hash((before, part)), initial=0))[1:]


def any_text(random: Random, tokens: int) -> str:
    """So many tokens, which no other text begins with."""
    return random.randbytes(tokens * _CHARACTERS // 2).hex()


class _Documents:
    """A template that all share, system prompts, and contexts of which few are asked for often (Zipf 1.0)."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._template = any_text(random, 325)
        self._systems = [any_text(random, 150) for _ in range(50)]
        self._contexts = [any_text(random, random.randint(1000, 6000)) for _ in range(3000)]
        self._of_contexts = list(accumulate(1 / rank for rank in range(1, 3001)))

    def call(self, at: float, *, own_system: bool) -> Call:
        """A question about a context. `own_system`: each context has one system prompt, else any."""
        random = self._random
        (context,) = random.choices(range(3000), cum_weights=self._of_contexts)
        system = self._systems[context % 50] if own_system else random.choice(self._systems)
        text = self._template + system + self._contexts[context]
        return chat_call(at, [text, _question(random)], _answer(random))


def rag1(random: Random, until: float) -> Iterator[Call]:
    """Each context has its system prompt."""
    documents = _Documents(random)
    for at in _arrivals(random, 54, until):
        yield documents.call(at, own_system=True)


def rag(random: Random, until: float) -> Iterator[Call]:
    """Any context comes after any system prompt."""
    documents = _Documents(random)
    for at in _arrivals(random, 28, until):
        yield documents.call(at, own_system=False)


def chat(random: Random, until: float) -> Iterator[Call]:
    """Conversations of 2 to 12 turns, each of which has all of those before it, some begun long before."""
    systems = [any_text(random, random.randint(400, 800)) for _ in range(10)]
    calls = []
    for begun in _arrivals(random, 9, until + 180):
        at, texts = begun - 180, [random.choice(systems)]
        for _ in range(random.randint(2, 12)):
            texts.append(any_text(random, random.randint(50, 250)))
            answer = random.randint(50, 300)
            if 0 <= at < until:
                calls.append(chat_call(at, texts, answer))
            texts.append(any_text(random, answer))
            at += random.uniform(5, 15)
    return iter(sorted(calls, key=lambda call: call.at))


def hot(random: Random, until: float) -> Iterator[Call]:
    """Six in ten share one long beginning; the others are as rag1's."""
    documents, shared = _Documents(random), any_text(random, 3000)
    for at in _arrivals(random, 70, until):
        if random.random() < 0.6:
            yield chat_call(at, [shared, _question(random)], _answer(random))
        else:
            yield documents.call(at, own_system=True)


def unique(random: Random, until: float) -> Iterator[Call]:
    """No two begin alike."""
    for at in _arrivals(random, 45, until):
        yield chat_call(at, [any_text(random, random.randint(500, 3000)), _question(random)], _answer(random))


Workload = Callable[[Random, float], Iterator[Call]]
WORKLOADS: dict[str, Workload] = {"rag1": rag1, "rag": rag, "chat": chat, "hot": hot, "unique": unique}


def _arrivals(random: Random, rate: float, until: float) -> Iterator[float]:
    """Poisson's, at so many a second."""
    at = random.expovariate(rate)
    while at < until:
        yield at
        at += random.expovariate(rate)


def _question(random: Random) -> str:
    return any_text(random, random.randint(20, 100))


def _answer(random: Random) -> int:
    return random.randint(50, 250)

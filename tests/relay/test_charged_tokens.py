"""What a call takes of its key's tokens: what vLLM tells, and else an estimate that goes by text and not by bytes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import Any

import orjson
import pytest

from gateway.admission.keys import Key, Keys
from gateway.admission.token_budget import TokenBudget
from gateway.wire.heads import answer_head
from gateway.wire.routes import ROUTES, Route
from tests.relay.test_exchange import JSON, OPENAI_STREAM, OPENAI_WHOLE, SSE
from tests.support.fake_vllm import DONE, EVENTS, event
from tests.support.recorders import CHAT, LIMITS, MESSAGES, RESPONSES, TRANSCRIPTIONS, Conversation

BY_PATH = {route.path: route for route in ROUTES}
RERANK, EMBEDDINGS = BY_PATH["/v1/rerank"], BY_PATH["/v1/embeddings"]
MANY = {**OPENAI_WHOLE, "max_tokens": 9000, "n": 2}
COUNTING = [BY_PATH[path] for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens")]


class Budget(TokenBudget):
    """One that keeps what calls reserved and took."""

    __slots__ = ("reserved", "told", "used")

    def __init__(self) -> None:
        super().__init__(10**8)
        self.reserved: list[float | None] = []
        self.used: list[int] = []
        self.told: list[bool] = []

    def reserve(self, now: float, asked: int | None) -> float | None:
        self.reserved.append(super().reserve(now, asked))
        return self.reserved[-1]

    def settle(self, now: float, reserved: float, used: int, *, told: bool = True) -> None:
        self.used.append(used)
        self.told.append(told)
        super().settle(now, reserved, used, told=told)


def asked(body: object, *, route: Route = CHAT, mean: int = 0, **settings: Any) -> tuple[Conversation, Budget]:
    """A call of a key whose calls took so many in the mean, and that key's tokens; without a body its head alone."""
    budget = Budget()
    budget.settle(0, 0, mean)
    budget.used.clear()
    budget.told.clear()
    headers = ((b"authorization", b"Bearer secret"), (b"content-type", b"multipart/form-data; boundary=x"))
    keys = Keys({hashlib.sha256(b"secret").digest(): Key("mine", tokens=budget)})
    talk = Conversation(route=route, keys=keys, headers=headers, **settings)
    if body is None:
        talk.begin()
    else:
        talk.ask(body)
    return talk, budget


def sent(body: object, **settings: Any) -> tuple[Conversation, Budget]:
    talk, budget = asked(body, **settings)
    talk.connect()
    return talk, budget


def quarter(body: object) -> int:
    return len(orjson.dumps(body)) // 4


def said(text: str) -> bytes:
    return event({"content": text})


@pytest.mark.parametrize("style", ["openai", "repr", "answer_part"])
@pytest.mark.parametrize("after", [[], [said(" and")], [said(" and"), said(" so"), said(" on")]])
def test_an_event_that_holds_many_tokens_is_no_single_one(style: str, after: list[bytes]) -> None:
    """As with `stream_interval`, which a call may say, and where tokens are guessed ahead."""
    big = " word" * 4000
    for body in (OPENAI_STREAM, {"messages": "Hi.", "stream_style": style}):
        talk, budget = sent(body)
        talk.head(200, SSE)
        for one in (EVENTS[0], said("A"), said(big), *after):
            talk.exchange.upstream_body(one)
        talk.leave()
        (used,), found = budget.used, talk.exchange.tokens
        assert found is not None
        assert found[2]
        assert used == found[0] + found[1]
        assert 0.99 * len(big) / 4 < found[1] < 1.05 * len(big) / 4
        assert budget.told == [False]


def test_a_usage_of_null_tells_nothing() -> None:
    talk, budget = sent(OPENAI_STREAM)
    talk.head(200, SSE)
    for text in ("A", " word" * 4000):
        talk.exchange.upstream_body(event({"content": text}, usage=None))
    talk.leave()
    assert budget.used[0] > 5000


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_an_event_too_large_to_be_held_is_counted_as_far_as_it_came(pieces: int) -> None:
    talk, budget = sent(OPENAI_STREAM)
    talk.head(200, SSE)
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.upstream_body(said("word " * 60_000)[: 70_000 * pieces])
    for _ in range(pieces - 1):
        talk.exchange.upstream_body(b"word " * 14_000)
    talk.leave()
    came = 70_000 * (2 * pieces - 1)
    assert 0.98 * came / 4 < budget.used[0] < 1.02 * came / 4


def test_what_stands_beside_the_text_of_each_event_is_not_taken_for_text() -> None:
    others = [{"token": "B" * 9, "logprob": -1.0}] * 20
    logprobs = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": others}]}
    talk, budget = sent(OPENAI_STREAM)
    talk.head(200, SSE)
    for _ in range(50):
        one = event({"content": "word"}, logprobs=logprobs)
        talk.exchange.upstream_chunk(b"%x\r\n%b\r\n" % (len(one), one), len(one))
    talk.leave()
    assert budget.used == [quarter(OPENAI_STREAM) + 50]


def seen(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_of_a_picture_its_bytes_are_no_tokens() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"\x89picture" * 30_000).decode()
    body = {"model": "demo", "stream": True, "messages": [seen(url)]}
    small = quarter({**body, "messages": [seen("")]})
    talk, budget = asked(body, limits=replace(LIMITS, max_body_bytes=10**7))
    talk.clock.advance(1)  # a long body is read in steps
    talk.connect()
    talk.leave()
    (used,) = budget.used
    assert small + 1000 <= used < small + 1010


@pytest.mark.parametrize("route", COUNTING, ids=lambda route: route.path)
def test_what_counts_tokens_takes_none(route: Route) -> None:
    talk, budget = sent({"model": "demo", "prompt": "x " * 2000, "max_tokens": 100}, route=route, mean=500)
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], b'{"input_tokens":10000,"usage":{"prompt_tokens":9}}')
    assert (budget.reserved, budget.used) == ([], [])


@pytest.mark.parametrize("route", [CHAT, MESSAGES], ids=["chat", "messages"])
def test_an_estimate_leaves_the_mean_as_it_is(route: Route) -> None:
    for _ in range(3):
        talk, budget = sent({**OPENAI_STREAM, "user": "x" * 3000}, route=route, mean=500)
        talk.leave()
        assert budget.told == [False]
        assert budget.reserve(talk.clock.now, None) == 500


def test_what_anthropics_usage_leaves_out_is_counted() -> None:
    usage = b'{"input_tokens":16,"output_tokens":20,"cache_read_input_tokens":9984,"cache_creation_input_tokens":null}'
    talk, budget = sent({**OPENAI_WHOLE, "max_tokens": 20}, route=MESSAGES)
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], b'{"usage":' + usage + b"}")
    assert talk.exchange.tokens == (10_000, 20, False)
    assert budget.used == [10_020]


def test_a_usage_with_long_rest_behind_it_is_found() -> None:
    answer = b'{"usage":{"prompt_tokens":2400,"total_tokens":2400},"results":[' + b'{"document":"x"},' * 1000 + b"{}]}"
    for size in (1, 7, 1000):
        talk, budget = sent({"model": "demo", "query": "q", "documents": ["x"]}, route=RERANK)
        talk.head(200, JSON)
        for at in range(0, len(answer), size):
            talk.exchange.upstream_body(answer[at : at + size])
        talk.exchange.upstream_end()
        assert talk.client.content == answer
        assert talk.exchange.tokens == (2400, 0, False)
        assert (budget.used, budget.told) == ([2400], [True])


@pytest.mark.parametrize("ends", ["the total limit", "its client leaves"])
@pytest.mark.parametrize(
    ("body", "route", "mean", "used"),
    [
        (MANY, CHAT, 700, quarter(MANY) + 18_000),
        (OPENAI_WHOLE, CHAT, 700, 700),
        (OPENAI_WHOLE, CHAT, 0, quarter(OPENAI_WHOLE)),
        ({"model": "demo", "input": "Hi"}, EMBEDDINGS, 700, quarter({"model": "demo", "input": "Hi"})),
    ],
)
def test_a_whole_call_that_was_sent_and_has_no_answer_takes_what_it_may_have(
    body: Any, route: Route, mean: int, used: int, ends: str
) -> None:
    talk, budget = sent(body, route=route, mean=mean)
    if ends == "the total limit":
        talk.clock.advance(LIMITS.total_timeout + 1)
        assert talk.client.status == 504
    else:
        talk.leave()
    assert (budget.used, budget.told) == ([used], [False])
    assert talk.exchange.tokens is None


def test_a_stream_that_never_began_in_time_takes_its_prompt() -> None:
    talk, budget = sent({**OPENAI_STREAM, "max_tokens": 9000})
    talk.clock.advance(LIMITS.first_token_timeout + 1)
    assert talk.client.status == 504
    assert budget.used == [quarter({**OPENAI_STREAM, "max_tokens": 9000})]


@pytest.mark.parametrize("how", ["unsent", "refused", "elsewhere", "broken"])
def test_a_call_for_which_no_server_worked_takes_nothing(how: str) -> None:
    talk, budget = asked({**OPENAI_WHOLE, "max_tokens": 9000}, mean=700, upstreams=2)
    if how != "unsent":
        talk.connect()
    if how == "refused":
        talk.exchange.upstream_answer(answer_head(400, JSON)[0], b"{}")
    elif how == "elsewhere":  # which is not reached, either
        talk.head(503, JSON)
    elif how == "broken":
        talk.lose(answered=False)
    if not talk.exchange.outcome:
        talk.leave()
    assert budget.used == [0]


def test_what_is_made_in_the_background_takes_what_it_asks_for() -> None:
    body = {"model": "demo", "input": "Hi", "background": True, "max_output_tokens": 4000}
    talk, budget = sent(body, route=RESPONSES)
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], b'{"status":"queued","usage":null}')
    assert budget.used == [quarter(body) + 4000]


def test_an_answer_whose_tokens_are_not_told_takes_its_text_alone() -> None:
    """As that to a recording, which tells seconds."""
    answer = orjson.dumps({"text": "word " * 80, "usage": {"type": "duration", "seconds": 30}})
    talk, budget = asked(b"sound" * 4000, route=TRANSCRIPTIONS, mean=700)
    talk.connect()
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], answer)
    assert budget.used == [1000 + len(answer) // 4]


def test_an_upload_that_was_left_half_way_takes_nothing() -> None:
    talk, budget = asked(None, route=TRANSCRIPTIONS, mean=700)
    talk.exchange.request_body(b"sound" * 14_000)
    talk.connect()
    talk.leave()
    assert talk.exchange.sent_at is not None
    assert budget.used == [0]


def test_a_stream_that_ends_untold_is_estimated_by_its_text() -> None:
    talk, budget = sent(OPENAI_STREAM)
    talk.head(200, SSE)
    for one in (EVENTS[0], *[said(" one two three four")] * 50, said(" end"), DONE):
        talk.exchange.upstream_body(one)
    talk.exchange.upstream_end()
    assert talk.exchange.tokens is not None
    assert 50 * 19 / 4 * 0.9 < talk.exchange.tokens[1] < 50 * 19 / 4 * 1.1
    assert budget.told == [False]

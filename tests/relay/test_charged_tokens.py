"""What a call takes of its key's tokens: what vLLM tells, and else an estimate."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
import pytest

from gateway.pool.keys import Key, Keys
from gateway.pool.token_budget import TokenBudget
from gateway.wire.heads import answer_head
from gateway.wire.routes import ROUTES, Route
from tests.relay.test_exchange import JSON, OPENAI_STREAM, OPENAI_WHOLE
from tests.support.recorders import CHAT, LIMITS, MESSAGES, RESPONSES, TRANSCRIPTIONS, Conversation

BY_PATH = {route.path: route for route in ROUTES}
EMBEDDINGS = BY_PATH["/v1/embeddings"]
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


def test_an_upload_that_was_left_half_way_takes_nothing() -> None:
    talk, budget = asked(None, route=TRANSCRIPTIONS, mean=700)
    talk.exchange.request_body(b"sound" * 14_000)
    talk.connect()
    talk.leave()
    assert talk.exchange.sent_at is not None
    assert budget.used == [0]

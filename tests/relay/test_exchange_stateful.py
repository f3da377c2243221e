"""An exchange under every order of events that a network can bring about, held to its contract after each."""

from __future__ import annotations

from dataclasses import replace

import orjson
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.relay.buffered_call import STALE_WITHIN
from gateway.relay.data_path import CallLimits
from gateway.wire import sse
from gateway.wire.errors import NoneReady
from gateway.wire.heads import Header
from gateway.wire.routes import Route
from tests.support.fake_vllm import DONE, EVENTS, completion
from tests.support.recorders import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    MODELS,
    RESPONSES,
    TICK,
    ConnectionRecorder,
    Conversation,
    CredentialsRecorder,
)
from tests.support.recorders import LIMITS as RECORDED

TURNS = [{"role": "user", "content": "What is it?"}]
# By name, as hypothesis shows what it drew.
ASKED: dict[str, tuple[Route, bytes]] = {
    "stream": (CHAT, orjson.dumps({"model": "demo", "messages": TURNS, "stream": True})),
    "whole": (CHAT, orjson.dumps({"model": "demo", "messages": TURNS})),
    "simplified stream": (CHAT, orjson.dumps({"messages": "What is it?"})),
    "answer parts": (CHAT, orjson.dumps({"messages": "What is it?", "stream_style": "answer_part"})),
    "responses": (RESPONSES, b'{"model":"demo","stream":true}'),
    "messages": (MESSAGES, b'{"model":"demo","stream":true}'),
    "repr stream": (CHAT, orjson.dumps({"messages": "What is it?", "stream_style": "repr"})),
    "simplified whole": (CHAT, orjson.dumps({"messages": "What is it?", "streaming": False})),
    "old prompt": (GENERATE, b'{"prompt":"Hi","stream":true}'),
    "missing model": (CHAT, orjson.dumps({"messages": "What is it?", "model": "missing"})),
    "not JSON": (CHAT, b"not JSON"),
    "completions": (COMPLETIONS, b'{"model": "demo", "prompt": "Once", "stream": true}'),
    "models": (MODELS, b""),
}
SSE: list[Header] = [(b"content-type", b"text/event-stream")]
JSON: list[Header] = [(b"content-type", b"application/json")]
HEADS = {
    "stream": (200, SSE),
    "compressed stream": (200, [*SSE, (b"content-encoding", b"gzip")]),
    "whole": (200, JSON),
    "refusal": (400, JSON),
    "failure": (503, JSON),
    "unauthorized": (401, JSON),
    "nothing": (204, list[Header]()),
}
PIECES = {
    "event": EVENTS[1],
    "half event": EVENTS[2][:30],
    "other half": EVENTS[2][30:],
    "line end": b"\n",
    "large half event": b"data: " + b"x" * 70_000,
    "error event": b'data: {"error":{}}\n\n',
    "completion": completion(),
    "no chunk": b"data: {\n\n",
}

# The largest body is smaller than two requests, so that a second piece may be one too many.
LIMITS = st.builds(
    CallLimits,
    max_connections=st.just(4096),
    max_body_bytes=st.just(150),
    queue_timeout=st.sampled_from([1.0, 6.0]),
    header_timeout=st.just(13.0),
    client_write_timeout=st.just(17.0),
    first_token_timeout=st.sampled_from([2.0, 16.0]),
    idle_timeout=st.sampled_from([1.0, 4.0]),
    total_timeout=st.sampled_from([12.0, 64.0]),
    body_timeout=st.sampled_from([2.0, 8.0]),
    heartbeat_interval=st.sampled_from([None, 0.5]),
)
# A limit is seen at the next look.
LATE = TICK


class ExchangeMachine(RuleBasedStateMachine):
    """The rules are what a network can do; what the exchange must do is in the recorders and the invariants."""

    talk: Conversation

    @initialize()
    def first_request(self) -> None:
        limits = replace(
            RECORDED, max_body_bytes=150, first_token_timeout=2, idle_timeout=2, total_timeout=12, body_timeout=2
        )
        self.begin("stream", limits, upstreams=1, served=("demo",))

    @precondition(lambda self: self.over)
    @rule(
        asked=st.sampled_from(list(ASKED)),
        limits=LIMITS,
        upstreams=st.sampled_from([2, 3, 1]),
        served=st.sampled_from([("demo",), ("demo",), ()]),
        full=st.sampled_from([False, False, True]),
        steps=st.sampled_from([1, 1, 2, 2, 3, 4, 0]),
    )
    def another_request(
        self, asked: str, limits: CallLimits, upstreams: int, served: tuple[str, ...], full: bool, steps: int
    ) -> None:
        """What follows has often gone well for some steps."""
        self.teardown()
        self.begin(asked, limits, upstreams, served, full=full)
        for _ in range(steps):
            self.it_goes_on()

    def begin(
        self, asked: str, limits: CallLimits, upstreams: int, served: tuple[str, ...], *, full: bool = False
    ) -> None:
        """A request's head comes; `full` where other calls have all the room."""
        route, self.content = ASKED[asked]
        self.credentials = CredentialsRecorder()
        self.talk = Conversation(
            route=route,
            limits=limits,
            upstreams=upstreams,
            models=served,
            max_in_flight_per_upstream=1,
            credentials=self.credentials,
        )
        self.talk.crowd(1 if full else 0)
        self.refused = 0
        self.renewing = False
        self.renewals: list[int] = []
        self.exchange, self.client, self.limits = self.talk.exchange, self.talk.client, limits
        self.body_ended = False
        self.dials_answered = 0
        self.answered = False
        self.head_came = False
        self.first_byte_at: float | None = None
        self.received_at: float | None = None
        self.queued_at = 0.0
        self.heard_at = self.talk.clock.now
        self.paused = False
        self.talk.begin()

    # What is so now

    @property
    def now(self) -> float:
        return self.talk.clock.now

    @property
    def over(self) -> bool:
        return bool(self.client.ending) or self.client.gone

    @property
    def lent(self) -> ConnectionRecorder | None:
        """The connection that the exchange has now."""
        connection = self.talk.connections[-1] if self.talk.connections else None
        return connection if connection and not connection.given_back and not connection.is_lost else None

    @property
    def queued(self) -> bool:
        return len(self.talk.path.queue) > 0

    @property
    def dialling(self) -> bool:
        return len(self.talk.transport.asked) > self.dials_answered

    @rule()
    def it_goes_on(self) -> None:
        """What happens next where nothing is wrong."""
        if self.over:
            return
        if not self.body_ended:
            self.body_comes(whole=True)
            self.request_ends()
        elif self.queued:
            self.room_comes()
        elif self.dialling:
            self.dial_ends("reused")
        elif self.renewing:
            self.renewal_ends(well=True)
        elif self.lent and not self.head_came:
            self.head_comes("stream" if self.exchange.streaming else "whole")
        elif self.lent and not self.lent.paused:
            self.answer_comes("event" if self.exchange.streaming else "completion")

    # The client's side

    @precondition(lambda self: not self.body_ended and not self.client.gone)
    @rule(whole=st.booleans())
    def body_comes(self, whole: bool) -> None:
        piece = self.content if whole else b" "
        if not piece:
            return
        if not self.over:
            self.heard_at = self.now
        self.exchange.request_body(piece)

    @precondition(lambda self: not self.body_ended and not self.client.gone)
    @rule()
    def request_ends(self) -> None:
        self.body_ended = True
        if not self.over:
            self.received_at = self.now
        self.exchange.request_end()

    @precondition(lambda self: self.client.status and not self.client.gone)
    @rule()
    def client_pauses_or_resumes(self) -> None:
        if self.over or not self.paused:
            self.paused = not self.over
            self.exchange.client_paused()
        else:
            self.paused = False
            self.heard_at = self.now
            self.exchange.client_resumed()

    @precondition(lambda self: self.talk.clock.now > self.exchange.started_at)
    @rule()
    def client_leaves(self) -> None:
        self.talk.leave()

    # The upstream's side

    @precondition(lambda self: self.talk.others)
    @rule()
    def room_comes(self) -> None:
        queued = self.queued
        self.talk.crowd(0)
        self.talk.path.queue.wake()
        assert not self.queued
        assert self.dialling or not queued

    @precondition(lambda self: self.dialling)
    @rule(how=st.sampled_from(["refused", "timed out", "fresh", "reused"]))
    def dial_ends(self, how: str) -> None:
        self.dials_answered += 1
        if how == "refused":
            self.exchange.upstream_unreachable("connection refused")
        elif how == "timed out":
            self.exchange.upstream_unreachable("it took no connection", timed_out=5)
        else:
            was_over = self.over
            connection = self.talk.connect(reused=how == "reused")
            in_vain = was_over or self.credentials.value is None
            assert self.over is in_vain
            assert bool(connection.sent) is not in_vain
            assert connection.given_back == ("released" if in_vain else "")

    @precondition(lambda self: self.lent and not self.head_came)
    @rule(head=st.sampled_from(list(HEADS)))
    def head_comes(self, head: str) -> None:
        self.answered = self.head_came = True
        asked, refused = len(self.talk.transport.asked), len(self.credentials.refused)
        streamed = self.exchange.streaming
        self.talk.head(*HEADS[head])
        if self.exchange.streaming and not streamed:
            self.heard_at = self.now  # until now nobody could know that it streams
        if head == "unauthorized":
            assert self.talk.connections[-1].given_back == "discarded"
            self.renewing = len(self.credentials.refused) > refused
            assert self.renewing is not self.over
            assert self.renewing or b'"upstream_unauthorized"' in self.client.content
            self.answered = self.head_came = False
            return
        if len(self.talk.transport.asked) > asked:
            assert head == "failure"
            assert self.talk.connections[-1].given_back == "discarded"
            self.refused += 1
            self.answered = self.head_came = False

    @precondition(lambda self: self.renewing)
    @rule(well=st.booleans())
    def renewal_ends(self, well: bool) -> None:
        self.renewing = False
        asked, was_over = self.talk.transport.asked[:], self.over
        self.credentials.tell(None if well else NoneReady("The model server has no token."))
        assert self.over is (was_over or not well)
        again = self.talk.transport.asked[len(asked) :]
        assert again == ([] if self.over else [(asked[-1][0], False)])
        if again:
            self.renewals.append(len(asked))

    @precondition(lambda self: self.dialling)
    @rule()
    def token_runs_out(self) -> None:
        self.credentials.value = None

    @precondition(lambda self: self.lent and self.head_came and not self.lent.paused)
    @rule(piece=st.sampled_from(list(PIECES)))
    def answer_comes(self, piece: str) -> None:
        if self.says_something(PIECES[piece]):
            self.hear(PIECES[piece])
        else:
            self.exchange.upstream_body(PIECES[piece])

    def says_something(self, data: bytes) -> bool:
        """Whether these bytes of a stream bring data, or the beginning of an event that may have some."""
        events = self.exchange._events
        if events is None or events.is_cut:
            return True
        came = events.held + data
        end = sse.end_of_last_event(came)
        return came[end : end + 1] not in (b"", b":") or any(map(sse.data_of, sse.split(came[:end])))

    @precondition(lambda self: self.lent and self.head_came and not self.lent.paused)
    @rule()
    def comment_comes(self) -> None:
        """Which is heard, but says nothing; where no event has begun."""
        if self.exchange._events is not None and not self.exchange._events.unfinished:
            self.exchange.upstream_body(b": keep-alive\n\n")

    def hear(self, data: bytes) -> None:
        self.heard_at = self.now
        self.first_byte_at = self.first_byte_at or self.now
        self.exchange.upstream_body(data)

    @precondition(lambda self: self.lent and self.head_came and not self.lent.paused)
    @rule(done=st.booleans())
    def answer_ends(self, done: bool) -> None:
        connection = self.lent
        assert connection is not None
        if done:
            self.hear(DONE)
        if self.lent:
            self.exchange.upstream_end()
            assert self.over
            if connection.given_back != "released":
                assert self.head_came
                assert self.exchange.outcome == "upstream_error"

    @precondition(lambda self: self.lent)
    @rule(half_head=st.booleans())
    def connection_breaks(self, half_head: bool) -> None:
        connection = self.lent
        assert connection is not None
        self.answered = self.answered or half_head
        sent_at = self.exchange.sent_at
        assert sent_at is not None
        self.talk.lose(answered=self.answered)
        if self.answered or not connection.reused or self.now - sent_at > STALE_WITHIN:
            assert self.over

    # Time

    @rule(seconds=st.sampled_from([0.0625, 0.125, 1.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.talk.clock.advance(seconds)

    # What holds after each of these

    @invariant()
    def no_request_is_sent_twice_after_a_byte_or_three_times_at_all(self) -> None:
        """But for the one time that it is sent with another token."""
        assert len(self.renewals) <= 1
        sent = [connection for connection in self.talk.connections if connection.sent]
        asked = [ask for at, ask in enumerate(self.talk.transport.asked) if at not in self.renewals]
        assert len(asked) <= 2
        if len(asked) == 2:
            assert asked[1][1] is (asked[0][0] is asked[1][0])
        assert len(sent) <= 2 + len(self.renewals)
        if len(sent) == 2 + len(self.renewals):
            assert self.refused or any(connection.is_lost and connection.reused for connection in sent)
        assert len({connection.request_body for connection in sent}) <= 1

    @invariant()
    def a_byte_of_answer_is_the_end_of_trying(self) -> None:
        if self.answered:
            assert not self.dialling

    @invariant()
    def the_upstreams_count_this_call_while_it_is_theirs(self) -> None:
        asked = self.talk.transport.asked
        counted = [upstream for upstream in self.talk.upstreams if upstream.in_flight > self.talk.others]
        assert counted == ([asked[-1][0]] if asked and not self.over else [])
        assert sum(upstream.in_flight for upstream in counted) <= 1

    @invariant()
    def an_end_leaves_nothing(self) -> None:
        if self.over:
            self.talk.assert_settled()
        else:
            assert self.exchange.outcome == ""
            assert self.talk.finished == []
            assert self.talk.path.in_flight == {self.exchange}

    @invariant()
    def the_outcome_is_true(self) -> None:
        if self.client.ending == "abort":
            assert self.exchange.outcome not in ("done", "client_left")
        before, error, after = self.client.content.rpartition(b'data: {"error":{"message":"The model server')
        if error:
            assert not before or before.endswith(b"\n\n")
            assert after.endswith(b"}\n\n" + DONE)
            assert self.exchange.outcome not in ("done", "client_left")
        if self.client.status and self.client.ending:
            assert self.exchange.status == self.client.status

    @invariant()
    def no_limit_passes_unseen(self) -> None:
        if self.over:
            return
        now = self.now - LATE
        if self.received_at is None:
            assert now < self.heard_at + self.limits.body_timeout
            return
        if self.queued:
            assert now < self.received_at + self.limits.queue_timeout
            self.queued_at = self.now  # what waits here is no wait for the upstream
        assert now < max(self.exchange.started_at + self.limits.total_timeout, self.received_at)
        if self.exchange.streaming and not self.paused:
            if self.first_byte_at is None:
                since = max(self.received_at, self.queued_at, self.heard_at)  # the client may have read no heartbeat
                assert now < since + self.limits.first_token_timeout
            else:
                assert now < self.heard_at + self.limits.idle_timeout

    @invariant()
    def no_limit_strikes_early(self) -> None:
        outcome, ended_at = self.exchange.outcome, self.exchange.ended_at
        if not outcome.startswith("timeout:") or ended_at is None:
            return
        which, limits = outcome.removeprefix("timeout:"), self.limits
        total = self.exchange.started_at + limits.total_timeout
        if which == "total":
            assert ended_at >= total
        elif which == "body":
            assert ended_at >= min(
                self.heard_at + limits.body_timeout, self.exchange.started_at + limits.body_timeout, total
            )
        elif which == "first_token":
            assert self.exchange.streaming
            assert self.received_at is not None
            assert ended_at >= self.received_at + limits.first_token_timeout
        elif which == "idle":
            assert self.exchange.streaming
            assert not self.paused
            assert ended_at >= self.heard_at + limits.idle_timeout

    @invariant()
    def a_pause_reaches_the_connection(self) -> None:
        if self.lent:
            assert self.lent.paused is self.paused

    def teardown(self) -> None:
        if not self.over:
            self.talk.leave()
        if self.dialling:
            self.dial_ends("reused")
        self.talk.assert_settled()


TestExchange = ExchangeMachine.TestCase

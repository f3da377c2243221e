"""Many clients and little room: some wait in line, the rest are told so at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time

import httpx
import pytest

from gateway.pool import upstream_pool
from tests.support.fake_vllm import FakeVllm, Hold, Step, response
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
WHOLE = b'{"model":"demo","messages":[{"role":"user","content":"Hi."}]}'


def held(hold: Hold, answer: bytes = b"{}") -> list[Step]:
    return [hold, response("200 OK", answer)]


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    until = time.monotonic() + 10
    while metric(client, name) != value:
        assert time.monotonic() < until, f"{name} never was {value}"


def ask(gateway: Gateway) -> httpx.Response:
    with gateway.client() as client:
        return client.post(CHAT, content=WHOLE)


def test_those_past_the_room_wait_and_those_past_the_queue_are_refused_at_once(fake: FakeVllm) -> None:
    holds = [Hold() for _ in range(4)]
    fake.queue(*[held(hold) for hold in holds])
    with (
        running(fake.url, max_in_flight=2, max_queue=2) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(ask, gateway) for _ in range(4)]
        wait_for(client, "gateway_waiting", 2)
        began = time.monotonic()
        refused = client.post(CHAT, content=WHOLE)
        assert time.monotonic() - began < 1
        fake.wait_for_request(2)
        assert len(fake.received) == 2
        for hold in holds:
            hold.release()
        assert [call.result().status_code for call in calls] == [200] * 4
        assert metric(client, "gateway_waiting") == metric(client, "gateway_in_flight") == 0
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
    assert refused.headers["retry-after"] == "1"
    assert len(fake.received) == 4


@pytest.mark.parametrize(
    ("proxies", "turns"), [("127.0.0.1", ["a", "b", "a", "a"]), ("10.0.0.1", ["a", "a", "a", "b"])]
)
def test_without_keys_clients_have_turns_by_their_address(fake: FakeVllm, proxies: str, turns: list[str]) -> None:
    holds = [Hold() for _ in range(5)]
    fake.queue(*[held(hold) for hold in holds])
    ended: list[str] = []
    addresses = {"a": "203.0.113.1", "b": "203.0.113.2"}
    with (
        running(fake.url, max_in_flight=1, trusted_proxies=proxies) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):

        def call(name: str) -> None:
            with gateway.client() as one:
                headers = {"x-forwarded-for": f"198.51.100.1, {addresses[name]}"}
                assert one.post(CHAT, content=WHOLE, headers=headers).status_code == 200
            ended.append(name)

        calls = [pool.submit(call, "a")]
        fake.wait_for_request()
        for waiting, name in enumerate(["a", "a", "a", "b"]):
            calls.append(pool.submit(call, name))
            wait_for(client, "gateway_waiting", waiting + 1)
        for done, hold in enumerate(holds):
            hold.release()
            calls_done(ended, done + 1)
        concurrent.futures.wait(calls)
        logged = [line["client"] for line in gateway.log(5)]
    assert ended[1:] == turns
    assert logged == [addresses[name] if proxies == "127.0.0.1" else "127.0.0.1" for name in ended]


@pytest.mark.parametrize(("proxies", "logged"), [("127.0.0.1", "203.0.113.1"), ("10.0.0.1", "127.0.0.1")])
def test_who_asked_for_what_there_is_not_is_logged(fake: FakeVllm, proxies: str, logged: str) -> None:
    with running(fake.url, trusted_proxies=proxies) as gateway, gateway.client() as client:
        client.get("/nowhere", headers={"x-forwarded-for": "203.0.113.1"})
        with gateway.connect() as raw:
            raw.sendall(b"NONSENSE\r\n\r\n")
            raw.recv(1000)
        asked, nonsense = gateway.log(2)
    assert (asked["client"], nonsense["client"]) == (logged, "127.0.0.1")


def test_without_keys_an_address_runs_no_more_than_it_may(fake: FakeVllm) -> None:
    holds = [Hold() for _ in range(3)]
    fake.queue(*[held(hold) for hold in holds])
    with (
        running(fake.url, key_max_in_flight=2) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        calls = [pool.submit(ask, gateway) for _ in range(3)]
        wait_for(client, "gateway_waiting", 1)
        fake.wait_for_request(2)
        for hold in holds:
            hold.release()
        assert [call.result().status_code for call in calls] == [200] * 3


def calls_done(ended: list[str], count: int) -> None:
    until = time.monotonic() + 10
    while len(ended) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_one_that_waits_too_long_is_refused(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue(held(hold))
    with (
        running(fake.url, max_in_flight=1, queue_timeout=0.3) as gateway,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(ask, gateway)
        fake.wait_for_request()
        refused = ask(gateway)
        hold.release()
        assert call.result().status_code == 200
    assert refused.status_code == 429
    assert "GATEWAY_QUEUE_TIMEOUT" in refused.json()["error"]["message"]
    assert len(fake.received) == 1


def test_clients_that_leave_the_queue_leave_no_trace(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue(held(hold))
    with (
        running(fake.url, max_in_flight=1, max_queue=50) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as stack,
    ):
        call = pool.submit(ask, gateway)
        fake.wait_for_request()
        connections: list[socket.socket] = []
        for _ in range(50):
            connections.append(stack.enter_context(gateway.connect()))
            connections[-1].sendall(
                b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(WHOLE), WHOLE)
            )
        wait_for(client, "gateway_waiting", 50)
        for connection in connections[:-1]:
            connection.close()
        wait_for(client, "gateway_waiting", 1)
        hold.release()
        assert call.result().status_code == 200
        assert connections[-1].recv(15) == b"HTTP/1.1 200 OK"
        wait_for(client, "gateway_in_flight", 0)
    assert len(fake.received) == 2


def test_a_model_that_is_busy_does_not_hold_up_another(fake: FakeVllm) -> None:
    hold = Hold()
    with FakeVllm(models=("other",)) as other:
        fake.queue(held(hold), held(hold))
        with (
            running(fake.url, other.url, max_in_flight_per_upstream=1) as gateway,
            gateway.client() as client,
            concurrent.futures.ThreadPoolExecutor(2) as pool,
        ):
            calls = [pool.submit(ask, gateway) for _ in range(2)]
            wait_for(client, "gateway_waiting", 1)
            assert client.post(CHAT, content=WHOLE.replace(b"demo", b"other")).status_code == 200
            hold.release()
            assert [call.result().status_code for call in calls] == [200] * 2


def test_an_upstream_that_refuses_is_not_felt_where_another_is_ready(fake: FakeVllm) -> None:
    with FakeVllm() as other:
        refusal = response("503 Service Unavailable", b"busy", "retry-after: 9")
        fake.queue(*[[refusal]] * 20)
        with running(fake.url, other.url) as gateway, gateway.client() as client:
            assert [client.post(CHAT, content=WHOLE).status_code for _ in range(20)] == [200] * 20
            assert metric(client, f'gateway_upstream_left_total{{upstream="{fake.url}"}}') == len(fake.received) == 3
            assert metric(client, f'gateway_upstream_state{{state="down",upstream="{fake.url}"}}') == 1
            assert len(other.received) == 20


def test_where_all_refuse_retry_after_is_kept(fake: FakeVllm) -> None:
    with FakeVllm() as other:
        for server, seconds in ((fake, 7), (other, 9)):
            server.queue([response("503 Service Unavailable", b"busy", f"retry-after: {seconds}")])
        with running(fake.url, other.url) as gateway, gateway.client() as client:
            answer = client.post(CHAT, content=WHOLE)
    assert (answer.status_code, answer.content) == (503, b"busy")
    assert answer.headers["retry-after"] in ("7", "9")
    assert len(fake.received) == len(other.received) == 1


def test_a_500_is_never_asked_again(fake: FakeVllm) -> None:
    with FakeVllm() as other:
        for server in (fake, other):
            server.queue([response("500 Internal Server Error", b"broken")])
        with running(fake.url, other.url) as gateway, gateway.client() as client:
            assert client.post(CHAT, content=WHOLE).status_code == 500
    assert len(fake.received) + len(other.received) == 1


def test_those_that_wait_go_to_an_upstream_that_comes_back(fake: FakeVllm) -> None:
    with FakeVllm() as other:
        port = other.port
    hold = Hold()
    fake.queue(held(hold))
    with (
        running(fake.url, f"http://127.0.0.1:{port}", max_in_flight_per_upstream=1, probe_interval=0.2) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        calls = [pool.submit(ask, gateway) for _ in range(2)]
        wait_for(client, "gateway_waiting", 1)
        with FakeVllm(port) as other:
            other.wait_for_request()
            wait_for(client, "gateway_in_flight", 1)
            hold.release()
            assert [call.result().status_code for call in calls] == [200] * 2


def test_a_slow_upstream_is_not_felt_where_another_can_answer(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue(held(hold))
    with (
        FakeVllm() as other,
        running(fake.url, other.url) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(ask, gateway)
        fake.wait(lambda: len(fake.received) + len(other.received) == 1)
        if not fake.received:  # it was the other's turn
            assert first.result().status_code == 200
            first = pool.submit(ask, gateway)
            fake.wait_for_request()
        so_far = len(other.received)
        assert [client.post(CHAT, content=WHOLE).status_code for _ in range(20)] == [200] * 20
        assert (len(fake.received), len(other.received) - so_far) == (1, 20)
        hold.release()
        assert first.result().status_code == 200


def test_one_that_is_healthy_but_fails_its_calls_is_taken_out_and_comes_back_by_itself(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upstream_pool, "TRIAL_AFTER", 0.5)
    caplog.set_level("INFO", "gateway.pool.upstream_pool")
    fake.queue(*[[response("500 Internal Server Error", b"broken")]] * 4)
    with (
        FakeVllm() as other,
        running(fake.url, other.url, trusted_proxies="127.0.0.0/8") as gateway,
        gateway.client() as client,
    ):

        def ask_until_it_gets(count: int, callers: int = 1) -> list[int]:
            until, statuses = time.monotonic() + 10, []
            while len(fake.received) < count:
                assert time.monotonic() < until, f"it gets no call number {count}"
                caller = {"x-forwarded-for": f"192.0.2.{1 + len(fake.received) % callers}"}
                statuses.append(client.post(CHAT, content=WHOLE, headers=caller).status_code)
            return statuses

        def state() -> str:
            found = client.get("/v1/health_check").json()["upstreams"]
            return str(next(one["state"] for one in found if one["url"] == fake.url))

        assert ask_until_it_gets(3, callers=2).count(500) == 3
        assert state() == "down"
        assert {client.post(CHAT, content=WHOLE).status_code for _ in range(20)} == {200}
        assert len(fake.received) == 3
        # A trial that breaks is one call, and none follows at once.
        assert ask_until_it_gets(4).count(500) == 1
        assert {client.post(CHAT, content=WHOLE).status_code for _ in range(20)} == {200}
        assert len(fake.received) == 4
        # One that does not is the end of it.
        assert set(ask_until_it_gets(5)) == {200}
        assert state() == "serving"
        ask_until_it_gets(7)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"upstream {fake.url} broke its last 3 calls: while others serve it gets one each 0.5 s",
        f"upstream {fake.url} answers again",
    ]


def test_what_one_caller_makes_fail_takes_no_readiness_from_the_others(fake: FakeVllm) -> None:
    broken = [response("500 Internal Server Error", b"broken")]
    with running(fake.url, trusted_proxies="127.0.0.0/8") as gateway, gateway.client() as client:

        def break_for(*callers: int) -> None:
            fake.queue(*[broken] * len(callers))
            for caller in callers:
                came_from = {"x-forwarded-for": f"192.0.2.{caller}", "connection": "close"}
                assert client.post(CHAT, content=WHOLE, headers=came_from).status_code == 500

        def health() -> tuple[int, str, str]:
            found = client.get("/v1/health_check")
            (upstream,) = found.json()["upstreams"]
            return found.status_code, upstream["state"], upstream["why"]

        break_for(1, 1, 1, 1)
        assert health() == (200, "serving", "one caller's last calls broke, 4 in a row")
        assert client.get("/ping").status_code == 200
        break_for(2)
        assert health() == (503, "down", "its last calls broke, 5 in a row")
        assert client.post(CHAT, content=WHOLE).status_code == 200
        assert health() == (200, "serving", "")

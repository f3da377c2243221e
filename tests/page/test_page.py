"""The page and what feeds it: who sees what, what it costs, and that it is gone where it is off."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway import housekeeping
from gateway.observability.own_version import own_build
from gateway.page import sampler
from tests.support.fake_vllm import CLOSE, RESET, STREAM_HEAD, FakeVllm, Hold, Step, completion, response
from tests.support.gateway_process import Gateway, running
from tests.support.paths import ROOT
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
STREAM = "/v1/status/stream"
SECRET = "sk-4f7d0c9a2b6e81d35a"
OTHER = "sk-other-1234567890abc"
CALL: dict[str, Any] = {"messages": {"user": "a prompt"}, "streaming": False}
PAGE = ROOT / "gateway/page/static"
LARGEST = 60_000


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds between two samples."""
    monkeypatch.setattr(sampler, "_EVERY", 0.1)
    return 0.1


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line:
            yield orjson.loads(line.removeprefix("data: "))


def metrics_asked(fake: FakeVllm) -> int:
    return len([probe for probe in list(fake.probed) if probe.target == "/metrics"])


def test_the_page_runs_nothing_but_what_it_came_with(client: httpx.Client) -> None:
    got = client.get("/")
    assert (got.status_code, got.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in got.headers["content-security-policy"].split("; "))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", got.text, re.DOTALL)
        assert policy[directive] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[directive] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert set(re.findall(r"https?://[^\s'\"]+", got.text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage", got.text)
    assert not re.search(r"\son\w+=|\sstyle=", (PAGE / "index.html").read_text())
    assert not re.search(r"\b(?:src|href)=\"(?!data:)", got.text)  # it has all its parts in it
    assert len(got.content) < LARGEST
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-store"


def test_the_page_has_every_part_of_it_and_none_of_their_comments(client: httpx.Client) -> None:
    got = client.get("/").text
    parts = [path for path in PAGE.rglob("*") if path.suffix in (".css", ".js")]
    assert {path.suffix for path in parts} == {".css", ".js"}
    for path in parts:
        first, *lines = path.read_text().splitlines()
        assert first.startswith(("// ", "/* ")), path
        assert first not in got
        name = next(line for line in lines if re.match(r"(?:async )?function |:root|#", line)).strip()
        assert re.sub(r"\s*[{].*", "", name) in got, path


def test_head_is_answered_as_get_is(client: httpx.Client) -> None:
    for path in ("/", "/v1/status", STREAM):
        got = client.head(path)
        assert (got.status_code, got.content) == (200, b"")
    assert client.post("/").status_code == 405


def test_what_the_page_is_fed_with_needs_a_key_and_the_page_holds_nothing(fake: FakeVllm) -> None:
    with running(fake.url, api_keys=SECRET) as gateway, gateway.client() as client:
        for path in ("/v1/status", STREAM):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"x-api-key": OTHER}).status_code == 401
        page = client.get("/")
        assert page.status_code == 200
        assert str(fake.port) not in page.text
        told = client.get("/v1/status", headers={"x-api-key": SECRET})
        assert told.json()["upstreams"][0]["url"] == fake.url


def test_who_watches_is_seen_off_once_the_key_is_taken_back(fake: FakeVllm, tmp_path: Path, often: float) -> None:
    file = tmp_path / "keys"
    file.write_text(f"one {sha256(SECRET.encode()).hexdigest()}\n")
    key = {"x-api-key": SECRET}
    with (
        running(fake.url, api_keys_file=str(file)) as gateway,
        gateway.client() as client,
        client.stream("GET", STREAM, headers=key) as answer,
    ):
        told = events(answer)
        next(told)
        file.write_text(f"two {sha256(OTHER.encode()).hexdigest()}\n")
        gateway.hang_up()
        assert len(list(told)) < 50


def test_off_there_is_no_trace_of_it(fake: FakeVllm) -> None:
    with running(fake.url, page=False) as gateway, gateway.client() as client:
        for path in ("/", "/v1/status", STREAM):
            assert client.get(path).status_code == 404
        assert not {"/", "/v1/status", STREAM} & client.get("/openapi.json").json()["paths"].keys()
    assert metrics_asked(fake) == 0


def test_what_serves_the_stream_is_loaded_with_the_first_that_is_asked_for(fake: FakeVllm) -> None:
    code = (
        "import sys; from tests.support.gateway_process import running\n"
        "with running(sys.argv[1]) as gateway, gateway.client() as client:\n"
        "    client.get('/v1/status')\n"
        "    assert 'sse_starlette' not in sys.modules\n"
        f"    client.head('{STREAM}')\n"
        "    assert 'sse_starlette' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, fake.url], check=True, timeout=60)


def test_the_status_tells_how_all_is(client: httpx.Client, fake: FakeVllm) -> None:
    got = client.get("/v1/status")
    assert (got.headers["content-type"], got.headers["cache-control"]) == ("application/json", "no-store")
    told = got.json()
    assert told["status"] == "serving"
    assert told["upstreams"][0].pop("age") >= 0
    assert told["upstreams"] == [
        {
            "url": fake.url,
            "state": "serving",
            "why": "",
            "models": ["demo"],
            "in_flight": 0,
            "source": fake.url,
            "prefix_hits": None,
            "running": 2,
            "waiting": 1,
            "kv_cache": 0.25,
            "tokens_per_second": None,
        }
    ]
    assert told["models"] == [{"model": "demo", "upstreams": 1, "serving": 1, "running": 0, "queue": 0}]
    assert told["keys"] is None
    assert (told["version"], told["build"]) == (version("vllm-gateway"), own_build())
    assert told["errors"] == []
    assert abs(told["time"] - time.time()) < 5
    assert told["history"].keys() == told["now"].keys()
    assert {len(values) for values in told["history"].values()} == {len(told["history"]["queue"])}


def test_a_gateway_that_has_just_begun_has_a_history_of_nothing(
    monkeypatch: pytest.MonkeyPatch, fake: FakeVllm
) -> None:
    monkeypatch.setattr(housekeeping, "_LOOK_AFTER", 60)  # it looks at nothing in time
    with running(fake.url) as gateway, gateway.client() as client:
        told = client.get("/v1/status").json()
        assert told["history"] == {name: [] for name in told["now"]}


BROKEN: list[tuple[list[Step], int, str, str | None]] = [
    # What a model server says of a request may repeat its prompt.
    ([response("400 Bad Request", b'{"error":{"message":"a prompt"}}')], 400, "done", None),
    ([b"HTTP/1.1 200", RESET], 502, "upstream_error", "upstream_broken"),
    ([STREAM_HEAD, CLOSE], 502, "upstream_error", "upstream_broken"),
]


@pytest.mark.parametrize(("script", "status", "outcome", "code"), BROKEN)
def test_the_last_errors_are_told_with_their_ids_and_no_prompt(
    client: httpx.Client, fake: FakeVllm, script: list[Step], status: int, outcome: str, code: str | None
) -> None:
    fake.queue(script)
    failed = client.post(CHAT, json={**CALL, "streaming": True})
    assert failed.status_code == status
    client.post(CHAT, json=CALL)
    until = time.monotonic() + 5
    while not (told := client.get("/v1/status")).json()["errors"]:
        assert time.monotonic() < until
    (error,) = told.json()["errors"]
    assert (error["status"], error["outcome"], error["path"]) == (status, outcome, CHAT)
    assert error["code"] == code
    assert error["message"] == (failed.json()["error"]["message"] if code else None)
    assert error["request_id"] == failed.headers["x-request-id"]
    assert error["upstream"] == fake.url
    assert "prompt" not in told.text


def test_what_runs_and_waits_is_told_by_model_and_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    lines = [f"one {sha256(SECRET.encode()).hexdigest()} 60 in-flight=1", f"two {sha256(OTHER.encode()).hexdigest()}"]
    file.write_text("\n".join(lines))
    hold = Hold()
    with (
        FakeVllm(models=("demo", "other")) as fake,
        FakeVllm(models=("other",)) as second,
        running(fake.url, second.url, api_keys_file=str(file)) as gateway,
        gateway.client(headers={"x-api-key": SECRET}) as client,
        ThreadPoolExecutor() as threads,
    ):
        fake.queue([hold, response("200 OK", completion())])
        calls = [threads.submit(client.post, CHAT, json={**CALL, "model": "demo"}) for _ in range(2)]
        try:
            until = time.monotonic() + 10
            while not (told := client.get("/v1/status").json())["now"]["queue"]:
                assert time.monotonic() < until
        finally:
            hold.release()
        assert [call.result().status_code for call in calls] == [200, 200]
        assert told["models"] == [
            {"model": "demo", "upstreams": 1, "serving": 1, "running": 1, "queue": 1},
            {"model": "other", "upstreams": 2, "serving": 2, "running": 0, "queue": 0},
        ]
        one, two = told["keys"]
        assert 58 <= one.pop("requests_left") <= 60  # one is earned each second
        assert one == {
            "name": "one",
            "running": 1,
            "max_in_flight": 1,
            "queue": 1,
            "requests_a_minute": 60,
            "tokens_left": None,
            "tokens_a_minute": None,
        }
        assert (two["name"], two["running"], two["queue"], two["requests_left"]) == ("two", 0, 0, None)
        assert SECRET not in str(told)


def test_a_model_that_is_not_served_has_no_name_here() -> None:
    hold = Hold()
    with (
        FakeVllm() as fake,
        FakeVllm(models=("other",)) as second,
        running(fake.url, second.url) as gateway,
        gateway.client() as client,
        ThreadPoolExecutor() as threads,
    ):
        for one in (fake, second):
            one.queue([hold, response("404 Not Found", b'{"error":{"message":"no such model"}}')])
        call = {"model": "a word of the client's", "messages": [{"role": "user", "content": "hi"}]}
        asked = threads.submit(client.post, CHAT, json=call)
        try:
            assert hold.reached.wait(10)
            told = client.get("/v1/status")
        finally:
            hold.release()
        assert asked.result().status_code == 404
    assert told.json()["models"][-1] == {"model": None, "upstreams": None, "serving": None, "running": 1, "queue": 0}
    assert "a word" not in told.text


def test_no_more_may_watch_than_there_are_places(client: httpx.Client) -> None:
    with contextlib.ExitStack() as watching:
        seen = [watching.enter_context(client.stream("GET", STREAM)) for _ in range(sampler.MOST_WATCHERS)]
        assert {answer.status_code for answer in seen} == {200}
        refused = client.get(STREAM)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "64 watch already" in refused.json()["error"]["message"]
        assert client.get("/v1/status").status_code == 200
    until = time.monotonic() + 10
    while client.head(STREAM).status_code != 200:  # those who left are seen with the next sample at the latest
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_stream_tells_of_each_sample(client: httpx.Client, fake: FakeVllm, often: float) -> None:
    with client.stream("GET", STREAM) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer)
        assert "history" in next(told)
        until = time.monotonic() + 20
        # That a request came is seen in the next samples alone, and how fast a count grows in none of the first.
        for one in told:
            assert "history" not in one
            if one["now"]["tokens_per_second"] is not None:
                break
            assert time.monotonic() < until
        client.post(CHAT, json={**CALL, "streaming": True})
        for one in told:
            if one["now"]["requests_per_second"]:
                break
            assert time.monotonic() < until
        assert one["now"]["first_token_p50"] <= one["now"]["first_token_p99"] < 5
        assert one["now"]["errors_per_second"] == 0
        assert one["now"]["tokens_per_second"] == 0  # the count that the upstream tells of stands still


def test_many_who_watch_cost_one_sampler_and_nobody_none(fake: FakeVllm, often: float) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        time.sleep(5 * often)
        assert metrics_asked(fake) == 0
        watches = [client.stream("GET", STREAM) for _ in range(20)]
        told = [events(watch.__enter__()) for watch in watches]
        for _ in range(5):
            assert all(next(one)["time"] for one in told)
        began, before = time.monotonic(), metrics_asked(fake)
        taken = {next(one)["time"] for _ in range(10) for one in told}
        asked, passed = metrics_asked(fake) - before, time.monotonic() - began
        assert asked <= passed / often + 2
        # Of all of them, one may be some samples behind another. Twenty samplers would have taken ten times more.
        assert len(taken) <= 2 * passed / often + 10
        for watch in watches:
            watch.__exit__(None, None, None)
        until = time.monotonic() + 20
        before = -1
        while before != (before := metrics_asked(fake)):  # that they have left is seen when there is time for it
            assert time.monotonic() < until
            time.sleep(5 * often)


def test_whoever_asks_again_and_again_has_the_upstream_asked_once_a_second(
    client: httpx.Client, fake: FakeVllm
) -> None:
    began = time.monotonic()
    for _ in range(20):
        client.get("/v1/status")
    assert metrics_asked(fake) <= time.monotonic() - began + 1.2


def test_an_upstream_that_is_gone_is_shown_within_three_seconds() -> None:
    fake = FakeVllm()
    with running(_started(fake)) as gateway, gateway.client() as client, client.stream("GET", STREAM) as answer:
        told = events(answer)
        assert next(told)["upstreams"][0]["state"] == "serving"
        fake.__exit__()
        gone = time.monotonic()
        upstream = next(one["upstreams"][0] for one in told if one["upstreams"][0]["state"] == "down")
        assert time.monotonic() - gone < 3
        assert upstream["why"] == "it refuses connections"
        assert upstream["kv_cache"] is None


def _started(fake: FakeVllm) -> str:
    fake.__enter__()
    return fake.url


def test_an_upstream_that_tells_nothing_of_itself_is_shown_without(client: httpx.Client, fake: FakeVllm) -> None:
    fake.probe_answers["/metrics"] = response("404 Not Found", b"")
    (upstream,) = client.get("/v1/status").json()["upstreams"]
    assert (upstream["state"], upstream["running"], upstream["kv_cache"]) == ("serving", None, None)


def test_an_upstream_is_asked_as_probes_are(fake: FakeVllm) -> None:
    with running(fake.url, upstream_api_key="sk-up") as gateway, gateway.client() as client:
        client.get("/v1/status")
    (asked,) = [probe for probe in fake.probed if probe.target == "/metrics"]
    assert asked.header("authorization") == "Bearer sk-up"


def test_who_watches_does_not_hold_up_the_end(fake: FakeVllm) -> None:
    with (
        running(fake.url, drain_timeout=30) as gateway,
        gateway.client() as client,
        client.stream("GET", STREAM) as answer,
    ):
        told = events(answer)
        next(told)
        gateway.signal()
        began = time.monotonic()
        assert [one["status"] for one in told][-1] == "draining"
        assert time.monotonic() - began < 3


def test_who_watches_sees_the_drain(fake: FakeVllm, often: float) -> None:
    with (
        running(fake.url, drain_delay=1.0) as gateway,
        gateway.client() as client,
        client.stream("GET", STREAM) as answer,
    ):
        told = events(answer)
        next(told)
        gateway.signal()
        assert len([one for one in told if one["status"] == "draining"]) > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_is_watched(fake: FakeVllm, number: signal.Signals) -> None:
    port = free_port()
    environment = {"GATEWAY_PORT": str(port), "GATEWAY_HOST": "127.0.0.1", "GATEWAY_UPSTREAMS": fake.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            assert process.stdout is not None
            assert "listening" in process.stdout.readline() + process.stdout.readline()
            with client.stream("GET", STREAM) as answer:
                told = events(answer)
                next(told)
                process.send_signal(number)
                began = time.monotonic()
                list(told)
            printed, _ = process.communicate(timeout=20)
            assert time.monotonic() - began < 5
    finally:
        process.kill()
    assert process.returncode == 0
    assert "ERROR" not in printed
    assert "Traceback" not in printed


def test_the_last_watch_is_as_the_log_and_the_metrics_know_it(client: httpx.Client, gateway: Gateway) -> None:
    client.get("/v1/status")
    assert 'route="/v1/status",status="200"' in client.get("/metrics").text
    client.get("/nowhere")
    assert gateway.log(1)[0]["path"] == "/nowhere"  # asked for once a second, it would hide the others

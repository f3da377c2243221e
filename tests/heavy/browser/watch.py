"""Watch in a real browser, in front of scripted vLLMs: charts under the pointer, queues, many upstreams and keys."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.heavy.browser.conftest import Open, Window, faults, sideways
from tests.support.fake_vllm import FakeVllm, Hold, completion, response
from tests.support.gateway_process import running

CHAT = "/v1/chat/completions"
# Five minutes of which each value tells its place.
AXIS = ["\u22125 min", "\u22124", "\u22123", "\u22122", "\u22121", "now"]
SERIES = ("in_flight", "queue", "buffered_bytes", "requests_per_second", "errors_per_second")
TIMES = ("first_token_p50", "first_token_p99", "tokens_per_second")
HISTORY = {name: list(range(300)) for name in (*SERIES, *TIMES)}
FEED: dict[str, Any] = {
    "status": "serving",
    "version": "9.8.7",
    "now": {name: values[-1] for name, values in HISTORY.items()},
    "upstreams": [],
    "errors": [],
    "time": 1_795_215_900.0,
    "history": HISTORY,
}


def fed(window: Window, **more: Any) -> None:
    """Have it show this, and no more."""
    event = f"data: {json.dumps(FEED | more)}\n\n"
    window.page.route("**/v1/status/stream", lambda route: route.fulfill(body=event, content_type="text/event-stream"))
    window.page.get_by_role("tab", name="Watch").click()
    window.page.locator("#figures .figure").get_by_text("299", exact=True).first.wait_for()


def upstream(at: int = 1, **more: Any) -> dict[str, Any]:
    figures = {"in_flight": 1, "running": 2, "waiting": 3, "kv_cache": 0.5, "tokens_per_second": 4, "prefix_hits": None}
    return {"url": f"http://10.0.0.{at}:8000", "state": "serving", "why": "", "models": ["demo"], **figures, **more}


@pytest.fixture
def window(opened: Open) -> Window:
    """In front of nothing that answers, whatever it is fed with."""
    with FakeVllm() as fake, running(fake.url) as gateway:
        return opened(gateway.url)


def test_it_says_what_it_is_and_what_it_serves(opened: Open) -> None:
    with FakeVllm(models=("a", "b", "c", "d", "e")) as fake, running(fake.url) as gateway:
        window = opened(gateway.url)
        window.page.get_by_text("Serving a, b, c and 2 more").wait_for()
        assert window.text("h1") == "vllm-gateway"
        assert window.text("#version") == version("vllm-gateway")
        assert window.page.get_by_label("Model", exact=True).locator("option").all_text_contents()[1:] == list("abcde")


def test_a_chart_has_its_peak_its_time_axis_and_the_value_under_the_pointer(window: Window) -> None:
    fed(window)
    page = window.page
    charts = page.locator("#figures > li")
    assert page.locator("#figures small.note").all_text_contents()[:2] == ["peak 299", "peak 299"]
    assert charts.first.locator(".axis span").all_text_contents() == AXIS
    plot = charts.first.locator(".plot")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 5)
    # Of all charts the same time, two and a half minutes ago: 23:02:30.
    figures = page.locator("#figures .figure").all_text_contents()
    assert {figure for figure in figures if figure.isdigit()} == {"149"}
    assert set(page.locator("#figures small.note").all_text_contents()) == {"23:02:30"}
    assert charts.first.locator(".pointer").get_attribute("d")
    page.mouse.move(0, 0)
    assert figures[0] != page.locator("#figures .figure").first.text_content() == "299"
    plot.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("PageDown")
    assert page.locator("#figures .figure").first.text_content() == "268"
    assert plot.get_attribute("aria-valuetext") == "23:04:29: 268"
    page.keyboard.press("Home")
    assert plot.get_attribute("aria-valuetext") == "23:00:01: 0"
    page.keyboard.press("Tab")
    assert page.locator("#figures .figure").first.text_content() == "299"


def test_an_upstream_has_its_source_state_and_prefix_hits(window: Window) -> None:
    down = upstream(3, state="down", why="it refuses connections", kv_cache=None)
    fed(window, upstreams=[upstream(1, source="dns", prefix_hits=0.75), upstream(2), down])
    cards = window.page.locator("#upstreams li")
    bad, good, plain = cards.all_text_contents()
    assert "down" in bad
    assert "it refuses connections" in bad
    for part in ("serving", "dns", "http://10.0.0.1:8000", "demo", "Prefix hits75%", "KV cache50%", "Waiting3"):
        assert part in good
    assert "Prefix hits\u2013" in plain
    assert faults(window) == []
    assert cards.nth(1).locator("meter").last.get_attribute("aria-label") == "Prefix hits"


def test_errors_have_their_code_and_sentence(window: Window) -> None:
    error = {"time": 1_795_215_900.0, "path": CHAT, "request_id": "id", "upstream": None, "code": None, "message": None}
    ours = {
        **error,
        "status": 429,
        "outcome": "refused",
        "code": "too_many_requests",
        "message": "No room <b>here</b>.",
    }
    limit = {**error, "status": 504, "outcome": "timeout:first_token", "request_id": "other"}
    fed(window, errors=[ours, limit])
    first, second = window.page.locator("#errors li").all_text_contents()
    for part in ("429", "too_many_requests", "No room <b>here</b>.", CHAT, "id"):
        assert part in first
    assert "A time limit has passed: first token." in second


def test_queues_are_shown_by_model_and_by_key(opened: Open, tmp_path: Path) -> None:
    keys = {name: f"sk-{name}-4f7d0c9a2b6e81d35a" for name in ("alice", "bob")}
    file = tmp_path / "keys"
    lines = [f"{name} {sha256(key.encode()).hexdigest()} 60 tokens=90000 in-flight=1" for name, key in keys.items()]
    file.write_text("\n".join(lines))
    hold = Hold()
    headers = {"x-api-key": keys["alice"]}
    call = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    with (
        FakeVllm() as fake,
        running(fake.url, api_keys_file=str(file)) as gateway,
        ThreadPoolExecutor() as threads,
    ):
        fake.queue([hold, response("200 OK", completion())])
        calls = [threads.submit(httpx.post, f"{gateway.url}{CHAT}", json=call, headers=headers) for _ in range(3)]
        try:
            window = opened(gateway.url)
            window.page.get_by_label("API key").fill(keys["bob"])
            window.page.keyboard.press("Enter")
            window.watches()
            window.page.wait_for_function(
                "() => document.querySelector('#models tbody td:last-child')?.textContent === '2'"
            )
            assert window.page.locator("#models tbody tr > *").all_text_contents() == ["demo", "1 of 1", "1", "2"]
            alice, bob = window.page.locator("#keys tbody tr").all()
            assert alice.locator("> *").all_text_contents()[:3] == ["alice", "1 of 1", "2"]
            assert "(60/min)" in alice.text_content()
            assert bob.locator("> *").all_text_contents()[:3] == ["bob", "0 of 1", "0"]
            assert "(90,000/min)" in alice.text_content()
            assert not any(key in window.page.content() for key in keys.values())
            assert faults(window) == []
        finally:
            hold.release()
        assert [one.result().status_code for one in calls] == [200, 200, 200]
    window.complaints.clear()


COLUMNS = "(cards) => new Set([...document.querySelectorAll(cards)].map((card) => card.getBoundingClientRect().x)).size"


def test_64_upstreams_and_50_keys_have_room(opened: Open, tmp_path: Path) -> None:
    key = "sk-4f7d0c9a2b6e81d35a"
    file = tmp_path / "keys"
    names = [f"a-team-with-a-rather-long-name-{at}" for at in range(50)]
    file.write_text("\n".join(f"{name} {sha256((key + name).encode()).hexdigest()} 600" for name in names))
    with FakeVllm(host="0.0.0.0") as fake:
        upstreams = [f"http://127.0.0.{at}:{fake.port}" for at in range(1, 65)]
        with running(*upstreams, api_keys_file=str(file)) as gateway:
            window = opened(gateway.url)
            page = window.page
            page.get_by_label("API key").fill(key + names[0])
            page.keyboard.press("Enter")
            window.watches()
            page.get_by_text("Serving: 64 of 64 upstreams").wait_for()
            assert page.locator("#upstreams li").count() == 64
            assert page.locator("#keys tbody tr").count() == 50
            assert page.locator("#keys-card").bounding_box()["height"] < 450
            for width, columns in ((1280, 3), (800, 2), (320, 1)):
                page.set_viewport_size({"width": width, "height": 800})
                for cards in ("#figures > li", "#upstreams > li"):
                    assert page.evaluate(COLUMNS, cards) == columns
                assert sideways(window) == 0
            assert faults(window) == []
            window.complaints.clear()  # of the first call, without its key

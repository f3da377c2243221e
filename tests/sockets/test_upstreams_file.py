"""A file of upstreams, which changes while the gateway serves, on both ways in."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway import reloading
from tests.support.fake_vllm import EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk, response
from tests.support.gateway_process import Gateway, running
from tests.support.paths import AUTHORITY

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "_EVERY", 0.02)


@pytest.fixture
def two() -> Iterator[list[FakeVllm]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeVllm(models=models)) for models in (("demo", "old"), ("demo", "new"))]


class File:
    """The file of upstreams, written as editors do: another in its place."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "upstreams"
        self.word = f"@{self.path}"

    def write(self, *lines: str) -> None:
        other = self.path.with_name("upstreams~")
        other.write_text("".join(f"{line}\n" for line in lines))
        os.replace(other, self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


def told(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/health_check").json()["upstreams"]
    return found


def become(gateway: Gateway, *wanted: tuple[str, str]) -> None:
    """Wait until the upstreams are these, by their URLs and states."""
    until = time.monotonic() + 20
    with gateway.client() as client:
        while (found := [(one["url"], one["state"]) for one in told(client)]) != list(wanted):
            assert time.monotonic() < until, found
            time.sleep(0.01)


def serve(*fakes: FakeVllm) -> list[tuple[str, str]]:
    return [(one.url, "serving") for one in fakes]


def test_what_the_file_says_holds_without_a_restart(two: list[FakeVllm], file: File) -> None:
    first, second = two
    hold = Hold()
    first.queue([STREAM_HEAD, chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
    file.write(first.url)
    with running(file.word, probe_interval=0.1) as gateway, gateway.client() as client:
        assert [(one["url"], one["source"]) for one in told(client)] == [(first.url, file.word)]
        with gateway.client() as other, other.stream("POST", CHAT, json={**OPENAI, "stream": True}) as stream:
            assert hold.reached.wait(10)
            file.write(f"{first.url} drain", second.url)
            become(gateway, *serve(second), (first.url, "draining"))
            assert [client.post(CHAT, json=OPENAI).status_code for _ in range(4)] == [200] * 4
            file.write(first.url, second.url)  # taken back: it is the one that it was
            become(gateway, *serve(first, second))
            assert [one["in_flight"] for one in told(client)] == [1, 0]
            file.write(second.url)
            become(gateway, *serve(second), (first.url, "draining"))
            hold.release()
            assert stream.read() == b"".join(EVENTS)
        become(gateway, *serve(second))
    assert (len(first.received), len(second.received)) == (1, 4)


def test_a_wrong_file_changes_nothing_and_says_so_once(
    two: list[FakeVllm], file: File, caplog: pytest.LogCaptureFixture
) -> None:
    def said(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    def says(text: str) -> None:
        until = time.monotonic() + 20
        while not said(text):
            assert time.monotonic() < until, caplog.text
            time.sleep(0.01)

    caplog.set_level("INFO")
    file.write(two[0].url)
    with running(file.word) as gateway, gateway.client() as client:
        file.write(f"{two[1].url} wieght=2")
        says("the upstreams stay as they are: GATEWAY_UPSTREAMS")
        file.path.unlink()
        says("cannot be read (No such file or directory)")
        file.write("")
        says("it has no upstream")
        become(gateway, *serve(two[0]))
        assert client.post(CHAT, json=OPENAI).status_code == 200
        assert said("stay as they are") == 3
        file.write(f"{two[1].url} key-file=late")
        says("late' cannot be read")
        (file.path.parent / "late").write_text("sk-late")
        says("upstreams read again: 1")
        become(gateway, *serve(two[1]))
    assert said("stay as they are") == 4


def test_links_that_are_swapped_and_signals_are_seen(two: list[FakeVllm], tmp_path: Path, file: File) -> None:
    # As Kubernetes mounts a ConfigMap: a file that is a link into a folder that is a link.
    for number, fake in enumerate(two):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "upstreams").write_text(f"{fake.url}\n")
    (tmp_path / "..data").symlink_to("..0")
    file.path.symlink_to("..data/upstreams")
    with running(file.word) as gateway:
        become(gateway, *serve(two[0]))
        (tmp_path / "..new").symlink_to("..1")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        become(gateway, *serve(two[1]))
        gateway.hang_up()
        become(gateway, *serve(two[1]))


def test_weights_are_parts_of_the_calls(two: list[FakeVllm], file: File) -> None:
    file.write(f"{two[0].url} weight=3", two[1].url)
    with running(file.word, route_headers=True) as gateway, gateway.client() as client:
        messages = [{"role": "user", "content": f"Document {number} says so. " * 40} for number in range(400)]
        names = Counter(
            client.post(CHAT, json={"model": "demo", "messages": [message]}).headers["x-gateway-upstream"]
            for message in messages
        )
    assert set(names.values()) == {len(two[0].received), len(two[1].received)}
    assert 0.65 < len(two[0].received) / 400 < 0.85


def test_each_may_have_models_a_key_and_an_authority_of_its_own(two: list[FakeVllm], file: File) -> None:
    (file.path.parent / "key").write_text("sk-of-its-own")
    with FakeVllm(certificate=AUTHORITY.parent / "good.pem", models=("tls",)) as secure:
        shutil.copy(AUTHORITY, file.path.parent / "ca.pem")
        file.write(f"{two[0].url} models=demo,x", f"{two[1].url} key-file=key", f"{secure.url} ca-file=ca.pem")
        with running(file.word, upstream_api_key="sk-of-all") as gateway, gateway.client() as client:
            become(gateway, *serve(*two, secure))
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["demo", "new", "tls"]
            for _ in range(4):
                for model in ("demo", "new", "tls"):
                    assert client.post(CHAT, json={**OPENAI, "model": model}).status_code == 200
            for fake, key in zip((*two, secure), ("of-all", "of-its-own", "of-all"), strict=True):
                shown = {got.header("authorization") for got in [*fake.received, *fake.probed]}
                assert shown == {f"Bearer sk-{key}"}
            two[1].queue([response("401 Unauthorized", b'{"error":{"message":"no"}}')])
            assert client.post(CHAT, json={**OPENAI, "model": "new"}).status_code == 401
            # Another key, and none of the models: both at once.
            (file.path.parent / "key").write_text("sk-another")
            file.write(f"{two[0].url} models=y", f"{two[1].url} key-file=key", f"{secure.url} ca-file=ca.pem")
            become(gateway, (two[0].url, "down"), *serve(two[1], secure))
            assert told(client)[0]["why"].startswith("it serves demo, old, and none of models=y, ")
            assert client.post(CHAT, json={**OPENAI, "model": "new"}).status_code == 200
            assert two[1].received[-1].header("authorization") == "Bearer sk-another"
            # An authority that has not signed its certificate.
            shutil.copy(AUTHORITY.parent / "other.pem", file.path.parent / "ca.pem")
            until = time.monotonic() + 20
            while "certificate" not in told(client)[2]["why"]:
                assert time.monotonic() < until
                time.sleep(0.01)


def test_other_names_move_and_are_told(two: list[FakeVllm], file: File) -> None:
    def moved(**to: float) -> dict[str, int]:
        models = ",".join(f"{model}:{weight}" for model, weight in to.items())
        version = "-".join(("now", *to))
        file.write(*(one.url for one in two), f"alias fast={models} {version}=demo")
        until = time.monotonic() + 20
        while client.get(f"/v1/models/{version}").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.01)
        counted: Counter[str] = Counter()
        for _ in range(20):
            answer = client.post(CHAT, json={**OPENAI, "model": "fast"})
            model, alias = answer.headers["x-gateway-model"].split("; ")
            assert alias == "alias=fast"
            counted[model] += 1
        return dict(counted)

    file.write(*(one.url for one in two))
    with running(file.word, route_headers=True) as gateway, gateway.client() as client:
        assert moved(old=1) == {"old": 20}
        assert moved(old=9, new=1) == {"old": 18, "new": 2}
        assert moved(new=1) == {"new": 20}
        text = client.get("/metrics").text
        lines = [line for line in gateway.log(60) if line.get("alias")]
    assert {orjson.loads(got.body)["model"] for one in two for got in one.received} == {"old", "new"}
    assert 'gateway_alias_requests_total{alias="fast",model="new"} 22.0' in text
    assert {(line["alias"], line["model"]) for line in lines} == {("fast", "old"), ("fast", "new")}

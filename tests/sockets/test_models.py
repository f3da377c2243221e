"""Which models there are: the list, one of them by its id, and what is said of one that nobody has."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fake_vllm import FakeVllm, response
from tests.support.gateway_process import running

CHAT = "/v1/chat/completions"
SECRET = "sk-4f7d0c9a2b6e81d35a"
ON_DISK: dict[str, Any] = {"id": "demo", "object": "model", "owned_by": "vllm", "root": "/models/demo", "parent": None}
ADAPTER: dict[str, Any] = {"id": "Org/Adapter", "object": "model", "root": "/adapters/a", "parent": "demo"}


def lists(fake: FakeVllm, *entries: dict[str, Any]) -> bytes:
    content = orjson.dumps({"object": "list", "data": entries})
    fake.probe_answers["/v1/models"] = response("200 OK", content)
    return content


def unpathed(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**entry, "root": entry["id"]} for entry in entries]


@pytest.mark.usefixtures("way")
def test_one_servers_list_is_its_own_but_for_where_its_models_lie(fake: FakeVllm) -> None:
    content = lists(fake, ON_DISK, ADAPTER)
    expected = content.replace(b"/models/demo", b"demo").replace(b"/adapters/a", b"Org/Adapter")
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.get("/v1/models", headers={"accept-encoding": "gzip"})
        assert (got.status_code, got.content) == (200, expected)
        assert fake.received[-1].header("accept-encoding") != "gzip"  # what is compressed cannot be read
        assert client.head("/v1/models").headers["content-length"] == str(len(expected))
        fake.queue([response("500 Internal Server Error", b'{"root":"/models/demo"}')])
        assert client.get("/v1/models").content == b'{"root":"/models/demo"}'  # an error is as it came


@pytest.mark.usefixtures("way")
def test_several_servers_lists_are_one(fake: FakeVllm) -> None:
    with FakeVllm() as other:
        lists(fake, ON_DISK, ADAPTER)
        lists(other, {"id": "embed", "root": "Org/Embed"}, {"id": "demo", "root": "Org/Demo"})
        with running(fake.url, other.url, probe_interval=0.1) as gateway, gateway.client() as client:
            both = client.get("/v1/models").json()
            assert both == {
                "object": "list",
                "data": [*unpathed(ON_DISK, ADAPTER), {"id": "embed", "root": "Org/Embed"}],
            }
            assert client.get("/v1/models").json() == both
            assert not [one for one in (*fake.received, *other.received) if one.target == "/v1/models"]
            fake.probe_answers["/health"] = response("500 Internal Server Error", b"")
            until, its = (
                time.monotonic() + 20,
                [{"id": "embed", "root": "Org/Embed"}, {"id": "demo", "root": "Org/Demo"}],
            )
            while (left := client.get("/v1/models").json()["data"]) != its:
                assert left == both["data"]
                assert time.monotonic() < until
            other.probe_answers["/health"] = response("500 Internal Server Error", b"")
            gateway.becomes(503, "/v1/models")
            for path in ("/v1/models", "/v1/models/demo"):
                down = client.get(path)
                assert (down.status_code, down.headers["retry-after"]) == (503, "2")
                assert down.json()["error"]["code"] == "no_upstream_ready"


@pytest.mark.usefixtures("way")
def test_the_one_server_that_is_gone_has_no_list() -> None:
    with contextlib.ExitStack() as stack:
        with FakeVllm() as fake:
            gateway = stack.enter_context(running(fake.url, probe_interval=0.1))
            client = stack.enter_context(gateway.client())
            assert client.get("/v1/models").status_code == 200
        gateway.becomes(503)
        for path in ("/v1/models", "/v1/models/demo"):
            down = client.get(path)
            assert (down.status_code, down.headers["retry-after"]) == (503, "2")
            assert down.json()["error"]["message"] == "No model server is up: try again soon."


@pytest.mark.usefixtures("way")
def test_another_name_is_in_the_list(fake: FakeVllm) -> None:
    lists(fake, ON_DISK)
    with running(fake.url, model_aliases="fast=demo, gone=x, *=demo") as gateway, gateway.client() as client:
        fast = {**ON_DISK, "id": "fast", "root": "demo"}
        assert client.get("/v1/models").json()["data"] == [*unpathed(ON_DISK), fast]
        assert client.get("/v1/models/fast").json() == fast


@pytest.mark.usefixtures("way")
def test_a_model_is_found_by_its_id_with_a_slash_encoded_or_not(fake: FakeVllm) -> None:
    odd = {"id": "a b/../c%d\u00e9?", "root": "x"}
    lists(fake, ON_DISK, ADAPTER, odd)
    with running(fake.url) as gateway, gateway.client() as client:

        def get(path: str, method: str = "GET") -> httpx.Response:
            return client.request(method, client.base_url.copy_with(raw_path=path.encode()))

        for path in ("/v1/models/Org/Adapter", "/v1/models/Org%2FAdapter", "/v1/models/Org%2fAdapter?a=b"):
            assert (got := get(path)).status_code == 200
            assert got.json() == unpathed(ADAPTER)[0]
        assert get("/v1/models/demo").json() == unpathed(ON_DISK)[0]
        assert get("/v1/models/a%20b/%2e%2E/c%25d%C3%A9%3F").json() == odd
        assert get("/v1/models/demo", "HEAD").status_code == 200
        metrics = client.get("/metrics").text
        assert 'route="/v1/models/{model}"' in metrics
        assert "Adapter" not in metrics.split("gateway_requests_total{", 1)[1].split("# HELP", 1)[0]
        for name in ("nope", "Demo", "..%2fhealth", "demo/", "%ff"):
            error = (got := get(f"/v1/models/{name}")).json()["error"]
            assert (got.status_code, error["code"], error["param"]) == (404, "model_not_found", "model"), name
            assert error["type"] == "invalid_request_error"
            assert "does not exist; those that do: demo, Org/Adapter, " in error["message"]
        for path in ("/v1/models/", "/v1/%6dodels/demo", "/v1/models%2Fdemo", "//v1/models/demo"):
            assert (got := get(path)).json()["error"]["code"] == "path_not_found", path
        assert get("/v1/models/demo", "POST").status_code == 405
        assert get("/v1/models/demo", "DELETE").status_code == 405
    assert not fake.received


@pytest.mark.usefixtures("way")
def test_a_models_own_path_is_guarded_and_goes_with_the_list(fake: FakeVllm) -> None:
    with running(fake.url, api_keys=SECRET) as gateway, gateway.client() as client:
        assert client.get("/v1/models/demo").status_code == 401
        assert client.get("/v1/models/demo", headers={"x-api-key": SECRET}).status_code == 200
    with running(fake.url, routes="chat") as gateway, gateway.client() as client:
        assert client.get("/v1/models/demo").json()["error"]["code"] == "path_not_found"
        assert "/v1/models/{model}" not in client.get("/openapi.json").json()["paths"]


SAYS = b'{"error":{"message":"The model `adapter` does not exist.","type":"NotFoundError","param":"model","code":404}}'
CALLS = {
    "simplified": {"messages": {"user": "Hi."}, "model": "adapter", "streaming": False},
    "simplified, streamed": {"messages": {"user": "Hi."}, "model": "adapter"},
    "openai": {"messages": [{"role": "user", "content": "Hi."}], "model": "adapter"},
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_that_is_in_no_list_is_for_the_upstream_to_judge(fake: FakeVllm, call: dict[str, Any]) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        assert client.post(CHAT, json=call).status_code == 200
        assert orjson.loads(fake.received[-1].body)["model"] == "adapter"
        fake.queue([response("404 Not Found", SAYS)])
        refused = client.post(CHAT, json=call)
        assert refused.status_code == 404
        assert refused.json() == {
            "error": {
                "message": "The model `adapter` does not exist. Those that are served: demo.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        }
        told = SAYS.replace(b"exist.", b"exist. Valid aliases: demo.")
        for own in (told, b"no JSON", b'{"error":{"message":"adapter"}}', b'{"error":"The model adapter"}'):
            fake.queue([response("404 Not Found", own)])
            assert client.post(CHAT, json=call).content == own  # it says so itself, or something else


@pytest.mark.usefixtures("way")
def test_what_is_served_is_told_by_the_names_that_a_client_may_use(fake: FakeVllm) -> None:
    with FakeVllm(models=("two",)) as other, running(fake.url, other.url, model_aliases="fast=two,x=y") as gateway:
        fake.queue([response("404 Not Found", SAYS)])
        other.queue([response("404 Not Found", SAYS)])
        with gateway.client() as client:
            refused = client.post(CHAT, json=CALLS["openai"])
    said = "The model `adapter` does not exist. Those that are served: demo, two, fast."
    assert refused.json()["error"]["message"] == said


NOT_THERE = response("404 Not Found", b'{"detail":"Not Found"}')
THERE = response("405 Method Not Allowed", b'{"detail":"Method Not Allowed"}')
TURNS: list[dict[str, str]] = [{"role": "user", "content": "Hi."}]
# By what takes them: calls that name no model.
UNNAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", CHAT, {"messages": TURNS}),
    ("chat", CHAT, {"messages": TURNS, "model": None}),
    ("chat", CHAT, {"messages": TURNS, "model": ""}),
    ("chat", CHAT, {"messages": TURNS, "stream": True}),
    ("chat", "/v1/completions", {"prompt": "Hi."}),
    ("chat", "/v1/responses", {"input": "Hi."}),
    ("embed", "/v1/embeddings", {"input": "Hi."}),
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("settings", "tokenizes"), [({}, "embed"), ({"model": "chat"}, "chat"), ({"model": "x"}, "embed")]
)
def test_a_call_that_names_no_model_is_for_one_that_takes_it(settings: dict[str, str], tokenizes: str) -> None:
    with FakeVllm(models=("embed",)) as embed, FakeVllm(models=("chat",)) as chat, FakeVllm(models=("other",)) as other:
        embed.probe_answers |= {CHAT: NOT_THERE, "/v1/completions": NOT_THERE, "/v1/embeddings": THERE}
        with running(embed.url, chat.url, other.url, **settings) as gateway, gateway.client() as client:
            for takes, path, call in [*UNNAMED, (tokenizes, "/tokenize", {"prompt": "Hi."})]:
                before = {server: len(server.received) for server in (embed, chat, other)}
                assert {client.post(path, json=call).status_code for _ in range(4)} == {200}
                got = {server for server in before if len(server.received) > before[server]}
                assert got == {embed if takes == "embed" else chat}, path
            assert orjson.loads(chat.received[0].body) == UNNAMED[0][2]  # it goes on as it came


@pytest.mark.usefixtures("way")
def test_a_call_that_names_no_model_goes_to_all_who_have_that_of_the_setting(fake: FakeVllm) -> None:
    with FakeVllm() as other, FakeVllm(models=("first",)) as first:
        with running(first.url, fake.url, other.url, model="demo") as gateway, gateway.client() as client:
            for _ in range(4):
                assert client.post(CHAT, json={"messages": TURNS}).status_code == 200
        assert (len(first.received), len(fake.received), len(other.received)) == (0, 2, 2)


@pytest.mark.usefixtures("way")
def test_the_404_of_what_none_takes_is_the_same_each_time(fake: FakeVllm) -> None:
    with FakeVllm(models=("two",)) as other, running(fake.url, other.url) as gateway, gateway.client() as client:
        fake.queue(*[[NOT_THERE]] * 4)
        said = {client.post("/v1/embeddings", json={"input": "Hi."}).text for _ in range(4)}
        assert len(fake.received) == 4
    assert [json for json in said if "The model 'demo' does not take /v1/embeddings" in json]


@pytest.mark.usefixtures("way")
def test_a_key_for_some_models_has_to_say_of_which_it_asks(fake: FakeVllm, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"one {hashlib.sha256(SECRET.encode()).hexdigest()} models=demo\n")
    headers = {"authorization": f"Bearer {SECRET}"}
    with (
        FakeVllm(models=("two",)) as other,
        running(fake.url, other.url, api_keys_file=file, model="demo") as gateway,
        gateway.client(headers=headers) as client,
    ):
        refused = client.post(CHAT, json={"messages": TURNS})
    assert (refused.status_code, fake.received, other.received) == (404, [], [])

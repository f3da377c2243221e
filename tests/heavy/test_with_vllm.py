"""Against the real vLLM, started by `vllm-gateway up` with the demo model."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.field_names import VLLM_FIELDS
from gateway.modelserver.demo_model import ensure_demo_model
from gateway.modelserver.install import ensure_environment
from gateway.wire.routes import REFUSED, ROUTES
from tests.commands import test_cli
from tests.support.examples import examples
from tests.support.gateway_process import running
from tests.support.paths import ROOT
from tests.support.stack import APP_CONFIG, MODEL, Stack
from tests.support.tee import Tee

pytestmark = pytest.mark.vllm

CHAT = "/v1/chat/completions"
README = (ROOT / "README.md").read_text()
FIRST_CALLS = (ROOT / "docs/first-calls.md").read_text()
API = (ROOT / "docs/api.md").read_text()
RAG = "### You are a helpful assistant. Answer from the search results. ### Search results: \n\n"
DEEP_LEARNING = {"messages": {"system": RAG, "user": "### Question: What is Deep Learning? \n\n"}}
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is vLLM?"}],
    "temperature": 0,
    "max_tokens": 60,
}
# Goes on for some thousand tokens, whatever the model thinks of it.
ENDLESS: dict[str, Any] = {**GREEDY, "ignore_eos": True, "max_tokens": 4000}
RESPONSE: dict[str, Any] = {"model": MODEL, "input": "What is vLLM?", "temperature": 0, "max_output_tokens": 60}
MESSAGE: dict[str, Any] = {**GREEDY}
PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "What is vLLM?", "max_tokens": 9, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(params=["shortcut", "app"])
def client(request: pytest.FixtureRequest, stack: Stack) -> Iterator[httpx.Client]:
    with stack.gateway() if request.param == "shortcut" else stack.early.client(timeout=120) as client:
        yield client


def chunks(body: str) -> list[dict[str, Any]]:
    events = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(stream: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in stream for choice in chunk["choices"])


def repr_text(body: str) -> str:
    events = [event.removeprefix("data: ") for event in body.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    return "".join(map(ast.literal_eval, events[:-1]))


def test_up_says_what_to_try(stack: Stack) -> None:
    assert f"Ready: the gateway on {stack.gateway_url}, in front of vLLM with {MODEL}" in stack.said
    assert stack.said.count(f"curl {stack.gateway_url}{CHAT}") == 2


def test_what_up_says_to_try_is_answered_right_each_time(stack: Stack) -> None:
    folder = ensure_demo_model(os.environ)
    bodies = [json.loads(shlex.split(line)[-1]) for line in stack.said.splitlines() if line.startswith("curl ")]
    with stack.gateway() as client:
        answers = [
            {client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] for _ in range(30)}
            for body in bodies
        ]

    assert [len(each) for each in answers] == [1, 1]
    assert [each.pop().partition(" ")[0] for each in answers] == ["Deep", "My"]
    # Of which this stack was told what it says by itself, for vllm-app's file to have every key.
    assert json.loads((folder / "generation_config.json").read_text())["top_k"] == APP_CONFIG["top_k"] == 1


def test_vllm_understands_what_is_made_of_vllm_apps_own_file(stack: Stack) -> None:
    found = re.search(r"vLLM's log: (.+)", stack.said)
    assert found
    log = Path(found[1]).read_text()
    assert "'cudagraph_mode': <CUDAGraphMode.PIECEWISE: 1>" in log
    assert "'cudagraph_capture_sizes': [1, 2, 4]" in log
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "repetition_penalty": 1.0, "max_new_tokens": 4096}
    assert f"'override_generation_config': {sampling}" in log


def test_a_gateway_started_before_vllm_says_loading_and_works_once_it_is_up(stack: Stack) -> None:
    call, health = stack.too_early
    ready = stack.early.becomes(200)  # a health check asks nobody, and the prober's last look may be a second old
    with stack.early.client() as client:
        later = client.post(CHAT, json={**DEEP_LEARNING, "streaming": False})

    assert call.status_code == 503
    assert int(call.headers["retry-after"]) > 0
    assert (health.status_code, health.json()["upstreams"][0]["state"]) == (503, "loading")
    assert (ready.status_code, later.status_code) == (200, 200)


def test_health_check_serves(client: httpx.Client) -> None:
    got = client.get("/v1/health_check")

    assert got.status_code == 200
    assert got.json()["upstreams"][0]["models"] == [MODEL]


def test_a_simplified_call_is_answered_whole(client: httpx.Client) -> None:
    got = client.post(CHAT, json={**DEEP_LEARNING, "streaming": False}).json()

    assert got["text"].startswith("Deep learning is a branch of machine learning")
    assert got["text"] == got["choices"][0]["message"]["content"]
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] > 10
    assert got["prompt"] == DEEP_LEARNING["messages"]["user"]
    assert (got["streaming"], got["stream"], got["data"], got["output_guardrail_params"]) == (False, False, None, None)


@pytest.mark.parametrize(("limit", "finish"), [(5, "length"), (200, "stop")])
def test_a_simplified_stream_loses_no_text_and_keeps_the_finish_reason(
    client: httpx.Client, limit: int, finish: str
) -> None:
    call = {**DEEP_LEARNING, "max_new_tokens": limit}
    whole = client.post(CHAT, json={**call, "streaming": False}).json()
    stream = chunks(client.post(CHAT, json=call).text)
    styled = client.post(CHAT, json={**call, "stream_style": "repr"}).text

    assert whole["choices"][0]["finish_reason"] == finish
    assert text_of(stream) == whole["text"] == repr_text(styled)
    assert [choice["finish_reason"] for choice in stream[-1]["choices"]] == [finish]
    if finish == "length":
        assert stream[-1]["choices"][0]["delta"]["content"]


def test_usage_is_streamed_where_it_is_asked_for(client: httpx.Client) -> None:
    stream = chunks(client.post(CHAT, json={**DEEP_LEARNING, "stream_options": {"include_usage": True}}).text)

    assert stream[-1]["usage"]["completion_tokens"] > 10


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, GREEDY),
        (CHAT, {**GREEDY, "stream": True}),
        (CHAT, {**GREEDY, "stream": True, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {**GREEDY, "stream": True, "n": 2, "temperature": 0.01}),
        (CHAT, {**GREEDY, "model": "nope"}),
        (CHAT, {**GREEDY, "temperature": -1}),
        (CHAT, {**GREEDY, "max_tokens": 100_000}),
        ("/v1/completions", {"model": MODEL, "prompt": "What is Deep Learning?", "max_tokens": 32, "temperature": 0}),
        ("/v1/completions", {"model": MODEL, "prompt": "Hello", "max_tokens": 9, "temperature": 0, "stream": True}),
        (f"{CHAT}/batch", {**GREEDY, "messages": [GREEDY["messages"], GREEDY["messages"]]}),
        ("/v1/responses", RESPONSE),
        ("/v1/responses", {**RESPONSE, "stream": True}),
        ("/v1/messages", MESSAGE),
        ("/v1/messages", {**MESSAGE, "stream": True}),
        ("/v1/messages", {**MESSAGE, "model": "nope"}),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": MESSAGE["messages"]}),
        ("/tokenize", {"model": MODEL, "prompt": "What is vLLM?"}),
        ("/detokenize", {"model": MODEL, "tokens": [90, 91]}),
    ],
)
def test_what_vllm_sends_is_what_the_client_gets(stack: Stack, path: str, body: dict[str, Any]) -> None:
    with (
        Tee(int(stack.vllm_url.rsplit(":", 1)[1])) as tee,
        running(tee.url) as gateway,
        gateway.client(timeout=60) as client,
    ):
        got = client.post(path, json=body)
        (sent,) = [answer for answer in tee.answers if answer.body == got.content]

    ours = {"date", "server", "transfer-encoding", "x-request-id"}
    assert got.status_code == sent.status
    # The order of headers of different names means nothing (RFC 9110, 5.3): the length comes last here.
    assert sorted(header for header in got.headers.multi_items() if header[0] not in ours) == sorted(
        header for header in sent.headers if header[0] not in ours
    )


def test_a_greedy_stream_reads_as_vllms_own(stack: Stack) -> None:
    call = {**GREEDY, "stream": True}
    with stack.gateway() as gateway, stack.vllm() as vllm:
        ours, its = chunks(gateway.post(CHAT, json=call).text), chunks(vllm.post(CHAT, json=call).text)

    assert text_of(ours) == text_of(its)
    assert ours[-1]["choices"][0]["finish_reason"] == its[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("call", [("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)])
def test_tokens_of_every_kind_of_stream_are_counted(stack: Stack, call: tuple[str, dict[str, Any]]) -> None:
    path, body = call
    with running(stack.vllm_url) as gateway, gateway.client(timeout=60) as client:
        usage = client.post(path, json=body).json()["usage"]
        streamed = client.post(path, json={**body, "stream": True})
        metrics = client.get("/metrics").text

    assert streamed.status_code == 200
    for kind, field in (("prompt", "input_tokens"), ("completion", "output_tokens")):
        labels = f'kind="{kind}",model="{MODEL}",source="reported"'
        assert f"gateway_tokens_total{{{labels}}} {2 * usage[field]:.1f}" in metrics
    assert 'gateway_outcomes_total{outcome="done"} 2.0' in metrics


COUNTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, GREEDY),
    (CHAT, {**GREEDY, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {**GREEDY, "n": 2, "temperature": 0.01}),
    (CHAT, {**GREEDY, "max_tokens": 1, "stream_options": {"include_usage": False, "continuous_usage_stats": True}}),
    (CHAT, {**GREEDY, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    ("/v1/completions", {"model": MODEL, "prompt": "What is vLLM?", "max_tokens": 9, "temperature": 0}),
    (
        "/v1/completions",
        {"model": MODEL, "prompt": ["What is", "Who"], "n": 2, "best_of": 2, "max_tokens": 5, "seed": 1},
    ),
    (
        "/v1/completions",
        {"model": MODEL, "prompt": "Who", "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0},
    ),
]


def by_choice(stream: bytes) -> dict[int, list[bytes]]:
    """Each choice's events without what differs from call to call; those of none are at -1."""
    stream = re.sub(rb'"id":"[^"]*"|"created":\d+|"id":"chatcmpl-tool-[^"]*"', b"", stream)
    found: dict[int, list[bytes]] = {}
    for one in stream.split(b"\n\n"):
        index = re.search(rb'"choices":\[\{"index":(\d+)', one)
        found.setdefault(int(index[1]) if index else -1, []).append(one)
    return found


@pytest.mark.parametrize(("path", "body"), COUNTED)
def test_a_stream_that_is_counted_is_byte_for_byte_the_one_that_is_not(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "stream": True}
    with (
        running(stack.vllm_url, count_tokens="on") as gateway,
        gateway.client(timeout=60) as client,
        stack.vllm() as vllm,
    ):
        # A busy vLLM puts two tokens into one event now and then.
        for _ in range(5):
            counted, plain = client.post(path, json=body), vllm.post(path, json=body)
            assert counted.status_code == plain.status_code == 200, plain.text
            (*_, logged) = gateway.log(1)
            if by_choice(counted.content) == by_choice(plain.content):
                break
    assert by_choice(counted.content) == by_choice(plain.content)
    assert b"system_fingerprint" in counted.content
    assert b'"usage"' not in counted.content
    assert logged["prompt_tokens"] > 0
    assert not logged["tokens_estimated"]


def test_of_two_fields_of_a_name_the_last_one_counts_and_a_mark_in_front_is_none(stack: Stack) -> None:
    body = orjson.dumps({**GREEDY, "model": "nope", "max_tokens": 50})
    twice = body[:-1] + b"," + orjson.dumps({"max_tokens": 2, "model": MODEL})[1:]
    with stack.vllm() as vllm:
        for content in (twice, b"\xef\xbb\xbf" + twice):
            got = vllm.post(CHAT, content=content, headers={"content-type": "application/json"}).json()
            assert (got["model"], got["usage"]["completion_tokens"]) == (MODEL, 2)
    assert orjson.loads(twice) == {**GREEDY, "model": MODEL, "max_tokens": 2}


def test_the_fields_that_are_known_are_vllms_own(stack: Stack) -> None:
    with stack.vllm() as vllm:
        schemas = vllm.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["ChatCompletionRequest"]["properties"]) == VLLM_FIELDS - {"return_weight_versions"}  # 0.33's


@pytest.mark.usefixtures("way")
def test_a_model_of_another_kind_is_told_in_a_sentence(stack: Stack) -> None:
    with running(stack.vllm_url) as gateway, gateway.client() as client:
        for path in ("/v1/embeddings", "/rerank"):
            got = client.post(path, json={"model": MODEL, "input": "Hi", "query": "Hi", "documents": ["Hi"]})
            error = got.json()["error"]
            assert (got.status_code, error["code"], error["request_id"]) == (
                404,
                "path_not_served",
                got.headers["x-request-id"],
            )
            assert error["message"] == f"The model '{MODEL}' does not take {path}."


def test_every_path_of_vllm_is_relayed_or_refused_on_purpose(stack: Stack) -> None:
    with stack.vllm() as vllm:
        described = vllm.get("/openapi.json").json()["paths"]
    # And those that a server has only with another model or option.
    source = ensure_environment(os.environ).parent.parent / "lib"
    decorated = re.compile(r'router\.(?:get|post|put|delete|api_route|websocket)\(\s*f?"([^"]+)"')
    files = list(source.glob("python3*/site-packages/vllm/entrypoints/**/*.py"))
    written = {path for file in files for path in decorated.findall(file.read_text())}
    relayed = {route.path for route in ROUTES if route.body not in ("generate", "ask")}

    assert len(written) > 60
    assert relayed <= written
    assert sorted((set(described) | written) - relayed - set(REFUSED)) == []
    assert not relayed & set(REFUSED)


def test_the_first_servers_documented_call_works(client: httpx.Client) -> None:
    prompt = "San Francisco is a"
    # curl's own content type, as the documentation names none.
    form = {"content-type": "application/x-www-form-urlencoded"}
    call = b'{"prompt": "San Francisco is a", "use_beam_search": true, "n": 4, "temperature": 0}'
    texts = client.post("/generate", content=call, headers=form).json()["text"]

    assert len(texts) == 4
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text in texts)


def test_models_are_vllms(stack: Stack) -> None:
    with stack.gateway() as gateway, stack.vllm() as vllm:
        ours, its = gateway.get("/v1/models").json(), vllm.get("/v1/models").json()

    assert ours["data"][0]["id"] == its["data"][0]["id"] == MODEL


@pytest.mark.parametrize("form", ["openai", "simplified"])
def test_a_named_tool_choice_passes(client: httpx.Client, form: str) -> None:
    function = {"name": "weather", "strict": True, "parameters": {"enum": ["Rome"]}}
    tools = [{"type": "function", "function": function}]
    messages = GREEDY["messages"] if form == "openai" else {"user": "What is vLLM?"}
    call = {"messages": messages, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "weather"}}}

    got = client.post(CHAT, json={**call, "stream": False, "max_tokens": 60, "temperature": 0}).json()

    called = got["choices"][0]["message"]["tool_calls"][0]["function"]
    assert called["name"] == "weather"
    assert json.loads(called["arguments"]) == "Rome"
    assert got.get("text", "") == ""


def test_logprobs_pass_in_the_simplified_form(client: httpx.Client) -> None:
    got = client.post(CHAT, json={**DEEP_LEARNING, "streaming": False, "logprobs": True}).json()

    assert len(got["choices"][0]["logprobs"]["content"]) == got["usage"]["completion_tokens"]


TEXT = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
SIMPLIFIED = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 2)},
    optional={
        "temperature": st.floats(0, 2) | st.integers(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True) | st.just(1),
        "typical_p": st.floats(),
        "top_k": st.integers(1, 50),
        "repetition_penalty": st.floats(0.5, 2),
        "seed": st.integers(0, 2**31),
        "stop": TEXT | st.lists(TEXT, max_size=2),
        "model": st.sampled_from([MODEL, None]),
        "stream_style": st.sampled_from(["openai", "repr", "answer_part", None]),
        "data": st.none() | st.dictionaries(TEXT, TEXT, max_size=1),
        "output_guardrail_params": st.none() | st.dictionaries(TEXT, TEXT, max_size=1),
        "id": TEXT,
    },
)
MESSAGES = (
    TEXT
    | st.fixed_dictionaries({"user": TEXT}, optional={"system": st.none() | st.text(max_size=9)})
    | st.fixed_dictionaries(
        {"user": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), min_size=1)}
    )
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}), max_size=2
    ).map(lambda turns: [*turns, {"role": "user", "content": "Hi"}])
)


@given(SIMPLIFIED, MESSAGES, st.booleans())
@examples(100)
def test_whatever_is_taken_in_the_simplified_form_vllm_takes(
    stack: Stack, fields: dict[str, Any], messages: Any, streaming: bool
) -> None:
    body = orjson.dumps({**fields, "messages": messages, "streaming": streaming})
    with stack.gateway() as client:
        answer = client.post(CHAT, content=body)
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text


def test_64_clients_at_once(client: httpx.Client) -> None:
    expected = client.post(CHAT, json={**DEEP_LEARNING, "streaming": False}).json()["text"]

    def ask(number: int) -> str:
        with httpx.Client(base_url=client.base_url, trust_env=False, timeout=120) as own:
            return text_of(chunks(own.post(CHAT, json=DEEP_LEARNING).text))

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert set(pool.map(ask, range(64))) == {expected}


def wait_for_running(stack: Stack, count: int) -> None:
    until = time.monotonic() + 20
    while (running := stack.running_requests()) != count:
        assert time.monotonic() < until, f"vLLM works on {running} requests, not on {count}"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_stops_the_generation(stack: Stack, streamed: bool) -> None:
    with stack.gateway() as client:
        body = json.dumps({**ENDLESS, "stream": streamed}).encode()
        if streamed:
            with client.stream("POST", CHAT, content=body) as got:
                assert got.status_code == 200
                pieces = got.iter_raw()  # kept, as httpx closes the answer with its iterator
                assert b'"content":' in next(pieces)
                wait_for_running(stack, 1)
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post(CHAT, content=body, timeout=2)
    left = time.monotonic()

    wait_for_running(stack, 0)

    assert time.monotonic() - left < 3, "vLLM went on for a client that had left"


def test_plan_counts_the_cache_as_vllm_logs_it(stack: Stack) -> None:
    found = re.search(r"vLLM's log: (.+)", stack.said)
    assert found
    logged = re.search(r"KV cache size: ([\d,]+) tokens, Maximum .*: ([\d.]+)x", Path(found[1]).read_text())
    assert logged
    argv = ["plan", str(ensure_demo_model(os.environ)), "--gpu", "24GiB", "--gpus", "1", "--dtype", "float32", "--json"]
    planned = json.loads(test_cli.command(*argv).stdout)["plans"][0]["sizes"][0]

    # The demo model has a cache of one gibibyte.
    for figure, told in (("tokens", logged[1].replace(",", "")), ("concurrency", logged[2])):
        of_a_gibibyte = planned[figure]["likely"] / planned["kv_cache_gib"]["likely"]
        assert of_a_gibibyte == pytest.approx(float(told), rel=0.002), figure


def test_a_batch_that_is_killed_five_times_has_each_answer_once(stack: Stack, tmp_path: Path) -> None:
    names = [f"{number:02}" for number in range(60)]
    requests = [{"messages": {"user": "What is vLLM?"}, "max_new_tokens": 60}, {**GREEDY}]
    lines = [
        {"custom_id": name, "method": "POST", "url": CHAT, "body": requests[number % 2]}
        for number, name in enumerate(names)
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    out.touch()
    argv = [sys.executable, "-m", "gateway", "batch", str(source), "-o", str(out), "--url", stack.gateway_url]
    for kill in range(1, 6):
        with subprocess.Popen([*argv, "--max-concurrency", "4"], stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 120
            while out.read_bytes().count(b"\n") < kill * len(names) // 10:
                assert time.monotonic() < until, "it goes on no more"
                time.sleep(0.01)
            process.kill()
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)

    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(result["custom_id"] for result in results) == names
    texts = {result["response"]["body"]["choices"][0]["message"]["content"] for result in results}
    assert (len(texts), {result["response"]["status_code"] for result in results}) == (1, {200})


OPENAI = """
import sys
from openai import OpenAI, NotFoundError, BadRequestError
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
ask = [{"role": "user", "content": "Who are you?"}]
whole = client.chat.completions.create(model="demo-model", messages=ask, temperature=0)
stream = client.chat.completions.create(model="demo-model", messages=ask, temperature=0, stream=True)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 5
assert [model.id for model in client.models.list()] == ["demo-model"]
try:
    client.chat.completions.create(model="nope", messages=ask)
except NotFoundError as error:
    assert "nope" in error.message
try:
    client.chat.completions.create(model="demo-model", messages="", extra_body={"max_new_tokens": 0})
except BadRequestError as error:
    print(error.body["request_id"], error.param)
print(whole.choices[0].message.content)
"""


def test_openais_own_client_works_whole_and_streamed(stack: Stack) -> None:
    python = ensure_environment(os.environ)  # the model server's, which has the client

    ended = subprocess.run(
        [python, "-c", OPENAI, stack.gateway_url], capture_output=True, text=True, timeout=120, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert "My name is Demo" in ended.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", FIRST_CALLS, re.MULTILINE | re.DOTALL)


def test_the_readmes_request_gets_the_answer_whose_beginning_it_shows(stack: Stack) -> None:
    ((request, shown),) = re.findall(r"^```sh\n(curl .*?)```\n\n```text\n(.*?)```", README, re.MULTILINE | re.DOTALL)
    command = request.replace("http://localhost:9000", stack.gateway_url)
    got = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout

    beginning, model, end = shown.split(" …")[0], '"model":"demo-model"', "…}\n"
    assert got.startswith(beginning)
    assert len(beginning) > 80
    assert model in got
    assert shown == f'{beginning} …",{model}, {end}'


def test_the_first_calls_get_the_answers_that_are_shown(stack: Stack) -> None:
    requests = [block for block in blocks("sh") if block.startswith("curl ")]
    answers = blocks("json")[:1] + blocks("text") + blocks("json")[1:]
    assert len(requests) == len(answers) == 4

    for request, answer in zip(requests, answers, strict=True):
        command = request.replace("http://localhost:9000", stack.gateway_url)
        command = command.replace("http://localhost:8008", stack.vllm_url)
        got = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout
        got = got.replace(stack.vllm_url, "http://localhost:8008")
        if answer.startswith("{"):
            assert json.loads(without_ids_and_version(got)) == json.loads(without_ids_and_version(answer))
        else:
            # vLLM may put two tokens into one event where it is slow; the text is the same.
            assert repr_text(got) == repr_text(answer)


def without_ids_and_version(body: str) -> str:
    return re.sub(r'"(id|system_fingerprint)": ?"[^"]*"|"created(_at)?": ?\d+|"age": ?[\d.]+', r'"":0', body)


def test_the_documents_requests_get_the_answers_that_it_shows(stack: Stack) -> None:
    document, _ = API.split("## Vectors")  # which another model gives
    pairs = re.findall(r"```sh\n(.*?)```\n\n```(json|text)\n(.*?)```\n", document, re.DOTALL)
    pairs = [
        pair for pair in pairs if "resp_" not in pair[0] and "background" not in pair[0]
    ]  # of another server's store
    assert len(pairs) > 12

    for request, kind, answer in pairs:
        command = request.replace("http://localhost:9000", stack.gateway_url)
        got = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout
        if kind == "json":
            assert json.loads(without_ids_and_version(got)) == json.loads(without_ids_and_version(answer))
        else:
            # A slow vLLM may put two tokens into one event, the first among them.
            ours, its = (without_ids_and_version(text).strip().split("\n\n") for text in (got, answer))
            assert ours[0][:20] == its[0][:20]
            assert ours[-1].split("\n")[-1][-25:] == its[-1].split("\n")[-1][-25:]


def test_what_is_shown_of_a_terminal_is_what_it_shows(stack: Stack) -> None:
    sessions = re.findall(r"```console\n(.*?)```", API, re.DOTALL)
    # What is typed into a conversation, tests/commands/test_chat.py types.
    asked = [session for session in sessions if "\n> " not in session]
    commands = [found for session in asked for found in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE)]
    assert len(commands) == 5
    assert 'chat "What is Deep Learning?"' in FIRST_CALLS

    python = f"{shlex.quote(sys.executable)} -m gateway"
    for command, shown in commands:
        got = subprocess.run(
            ["bash", "-c", command.replace("vllm-gateway", python)],
            cwd=ROOT,
            env={**os.environ, "GATEWAY_PORT": stack.gateway_url.rpartition(":")[2]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        ).stdout
        assert without_ids_and_times(got) == without_ids_and_times(shown)


def test_the_rag_quickstarts_calls_get_the_answers_that_are_shown(stack: Stack, tmp_path: Path) -> None:
    document = (ROOT / "docs/rag.md").read_text()
    (made,) = re.findall(r"```sh\n(echo .*?)```", document, re.DOTALL)
    (session,) = re.findall(r"```console\n\$ vllm-gateway (.*?)```", document, re.DOTALL)
    ((call, replied),) = re.findall(r"```sh\n(curl .*?)```\n\n```text\n(.*?)```", document, re.DOTALL)
    command, _, answered = session.partition("\n")

    def said(script: str) -> str:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "GATEWAY_PORT": stack.gateway_url.rpartition(":")[2], "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    said(made)
    # Answers go to standard output, and what they cite to standard error.
    assert said(f"{shlex.quote(sys.executable)} -m gateway {command} 2>&1") == answered
    assert said(call.replace("http://localhost:9000", stack.gateway_url)) == replied


def without_ids_and_times(shown: str) -> str:
    return re.sub(r"[0-9a-f]{32}|(?<=:)\d+\.\d+", "", shown)


def test_the_first_calls_python_runs(stack: Stack) -> None:
    script = blocks("python")[0].replace("http://localhost:9000", stack.gateway_url)

    ended = subprocess.run(
        [ensure_environment(os.environ), "-c", script], capture_output=True, text=True, timeout=120, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("vLLM is ")


def test_the_template_that_ships_for_gaudis_model_is_its_documented_prompt() -> None:
    """As transformers renders it for vLLM; the prompt is the one of the model's card."""
    script = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
for some in (messages[:2], messages[1:2], messages):
    print(tokenizer.apply_chat_template(
        some, chat_template=open(sys.argv[2]).read(), add_generation_prompt=True, tokenize=False, eos_token="</s>"
    ), end="--")
"""
    template = ROOT / "docker/hpu/templates/neural-chat.jinja"
    python = ensure_environment(os.environ)
    argv = [str(python), "-c", script, str(ensure_demo_model(os.environ, python)), str(template)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("--") == [
        "### System:\nsystem\n### User:\nuser\n### Assistant:\n",
        "### User:\nuser\n### Assistant:\n",
        "### System:\nsystem\n### User:\nuser\n### Assistant:\nassistant</s>\n### User:\nuser\n### Assistant:\n",
        "",
    ]

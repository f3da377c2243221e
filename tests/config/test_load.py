"""Settings: every name and alias, what beats what, and what a wrong one is told."""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.config.environment import SettingsError
from gateway.config.load import build, differing, load
from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import Settings, names_of, table
from tests.support.paths import AUTHORITY, SUPPORT

KEY = "sk-4f7d0c9a2b6e81d35a"
CERTIFICATE = AUTHORITY.parent / "good.pem"
# A file of keys that there is.
KEYS = SUPPORT / "keys.txt"
TOKENS = {
    "GATEWAY_UPSTREAM_TOKEN_URL": "https://login.example.com/token",
    "GATEWAY_UPSTREAM_CLIENT_ID": "id",
    "GATEWAY_UPSTREAM_CLIENT_SECRET": "secret",
}
# What a setting cannot do without.
NEEDS = {
    "tls_key_file": {"GATEWAY_TLS_CERT_FILE": str(CERTIFICATE)},
    "cache_salt": {"GATEWAY_API_KEYS": KEY},
    "upstream_token_url": TOKENS,
    "upstream_client_id": TOKENS,
    "upstream_client_secret": TOKENS,
}
VALUES: list[tuple[str, str, Any]] = [
    ("host", "127.0.0.1", "127.0.0.1"),
    ("port", "9100", 9100),
    ("upstreams", "http://a:1, http://b:2/v1/", ("http://a:1", "http://b:2")),
    ("upstream_api_key", "sk-1", "sk-1"),
    ("upstream_token_url", "HTTPS://login.example.com/token?a=1", "https://login.example.com/token?a=1"),
    ("upstream_client_id", "gateway", "gateway"),
    ("upstream_client_secret", "s3cret", "s3cret"),
    ("model", "org/name", "org/name"),
    ("routing", "least", "least"),
    ("stream_style", "repr", "repr"),
    ("openai_format_streaming", "True", True),
    ("forward_sampling", "True", True),
    ("count_tokens", "off", "off"),
    (
        "model_aliases",
        "fast=org/name, *=other:9,new:0.5",
        {"fast": {"org/name": 1.0}, "*": {"other": 9.0, "new": 0.5}},
    ),
    ("route_headers", "on", True),
    ("upstream_ca_file", str(AUTHORITY), AUTHORITY),
    ("tls_skip_verify", "True", True),
    ("api_keys", f"{KEY}, {KEY[::-1]}", (KEY, KEY[::-1])),
    ("api_keys_file", str(KEYS), KEYS),
    ("cache_salt", "key", "key"),
    ("compat", "erag-1.4", "erag-1.4"),
    ("routes", "chat, models", ("chat", "models")),
    ("connector", "langchain", "langchain"),
    ("disable_streaming", "True", True),
    ("output_guard", "True", True),
    ("health_port", "9001", 9001),
    ("metrics_port", "9464", 9464),
    ("tls_cert_file", str(CERTIFICATE), CERTIFICATE),
    ("tls_key_file", str(CERTIFICATE), CERTIFICATE),
    ("allowed_hosts", "gateway.example, Gateway-2", ("gateway.example", "Gateway-2")),
    ("cors_origins", "https://a.example, http://b:3000", ("https://a.example", "http://b:3000")),
    ("system_role", "merge", "merge"),
    ("max_in_flight", "12", 12),
    ("max_in_flight_per_upstream", "13", 13),
    ("key_max_in_flight", "18", 18),
    ("max_queue", "0", 0),
    ("queue_timeout", "14", 14),
    ("max_connections", "500", 500),
    ("max_buffered_bytes", "2097152", 2_097_152),
    ("max_body_bytes", "2048", 2048),
    ("max_head_bytes", "4096", 4096),
    ("max_headers", "20", 20),
    ("max_url_bytes", "512", 512),
    ("max_n", "4", 4),
    ("max_new_tokens", "512", 512),
    ("max_messages", "30", 30),
    ("max_inputs", "31", 31),
    ("max_json_values", "20000", 20_000),
    ("upstream_max_age", "60", 60.0),
    ("upstream_max_requests", "10", 10),
    ("tcp_keepalive", "60", 60.0),
    ("max_json_bytes", "70000", 70_000),
    ("refused_fields", "cache_salt, user", ("cache_salt", "user")),
    ("forwarded_headers", "X-Session-ID, x-vllm-priority", ("x-session-id", "x-vllm-priority")),
    ("max_json_depth", "40", 40),
    ("media_domains", "a.example, B.example", ("a.example", "b.example")),
    ("connect_timeout", "0.5", 0.5),
    ("first_token_timeout", "7", 7),
    ("idle_timeout", "8", 8),
    ("total_timeout", "9", 9),
    ("heartbeat_interval", "20", 20),
    ("header_timeout", "15", 15),
    ("body_timeout", "10", 10),
    ("client_write_timeout", "16", 16),
    ("probe_interval", "11", 11),
    ("drain_delay", "17", 17),
    ("drain_timeout", "0", 0),
    ("stop_grace", "1m40s", 100),
    ("trusted_proxies", "10.0.0.0/8, ::1", (ip_network("10.0.0.0/8"), ip_network("::1"))),
    ("shortcut", "off", False),
    ("page", "off", False),
    ("log_format", "text", "text"),
    ("log_level", "debug", "DEBUG"),
]
ALIASES = {
    "LLM_USVC_PORT": "port",
    "LLM_MODEL_SERVER_ENDPOINT": "upstreams",
    "LLM_VLLM_API_KEY": "upstream_api_key",
    "LLM_VLLM_TOKEN_URL": "upstream_token_url",
    "LLM_VLLM_CLIENT_ID": "upstream_client_id",
    "LLM_VLLM_CLIENT_SECRET": "upstream_client_secret",
    "LLM_MODEL_NAME": "model",
    "LLM_TLS_SKIP_VERIFY": "tls_skip_verify",
    "LLM_CONNECTOR": "connector",
    "LLM_OPENAI_FORMAT_STREAMING": "openai_format_streaming",
    "LLM_DISABLE_STREAMING": "disable_streaming",
    "LLM_OUTPUT_GUARD_EXISTS": "output_guard",
    "PORT_HEALTH": "health_port",
    "OPEA_LOGGER_LEVEL": "log_level",
}
RAW = {field: raw for field, raw, _ in VALUES}
READ = {field: value for field, _, value in VALUES}


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("GATEWAY_", "LLM_", "OPEA_")):
            monkeypatch.delenv(name)


def value_of(settings: Settings, field: str) -> Any:
    value = getattr(settings, field)
    if field == "api_keys":
        return tuple(key.get_secret_value() for key in value)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def set_what_it_needs(field: str, monkeypatch: pytest.MonkeyPatch, *, but: str) -> None:
    for name, needed in NEEDS.get(field, {}).items():
        if name != but:
            monkeypatch.setenv(name, needed)


def wrong(env_file: Path | None = None, **given: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        load(env_file, **given)
    return str(raised.value)


@pytest.mark.parametrize(("field", "raw", "value"), VALUES)
def test_a_setting_is_read_by_its_name(field: str, raw: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value_of(Settings(), field) != value
    set_what_it_needs(field, monkeypatch, but=f"GATEWAY_{field.upper()}")
    monkeypatch.setenv(f"GATEWAY_{field.upper()}", raw)
    settings, _, warnings = load()
    assert value_of(settings, field) == value
    assert warnings == []


def test_every_setting_and_alias_stands_in_these_tables() -> None:
    assert set(Settings.model_fields) == set(RAW)
    assert {name for field in RAW for name in names_of(field)[1:]} == set(ALIASES)
    assert {name.split(", ")[0] for name, _, _ in table()} == {f"GATEWAY_{field.upper()}" for field in RAW}


@pytest.mark.parametrize(
    ("given", "style"),
    [
        ({"compat": "erag-1.4"}, "repr"),
        ({"compat": "erag-2.0"}, "repr"),
        ({"compat": "erag-2.1"}, "openai"),
        ({"compat": "erag-2.0", "openai_format_streaming": "True"}, "openai"),
        ({"compat": "erag-2.0", "openai_format_streaming": "False"}, "repr"),
        ({"compat": "erag-2.1", "openai_format_streaming": "False"}, "openai"),
        ({"compat": "erag-1.4", "openai_format_streaming": "True"}, "repr"),
        ({"openai_format_streaming": "False"}, "repr"),
        ({"openai_format_streaming": "False", "stream_style": "answer_part"}, "answer_part"),
        ({"compat": "erag-1.4", "stream_style": "openai"}, "openai"),
    ],
)
def test_a_release_brings_its_stream_style(given: dict[str, str], style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in given.items():
        monkeypatch.setenv(f"GATEWAY_{field.upper()}", value)
    assert load()[0].stream_style == style


@pytest.mark.parametrize(
    ("file", "why"),
    [(None, "No such file or directory"), ("", "it holds no certificate"), ("x", "it holds no certificate")],
)
def test_a_file_of_certificates_that_is_none_stops_the_start(
    file: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ca.pem"
    if file is not None:
        path.write_text(file)
    monkeypatch.setenv("GATEWAY_UPSTREAMS", "https://vllm:8008")
    assert wrong(upstream_ca_file=str(path)) == (
        f"GATEWAY_UPSTREAM_CA_FILE '{path}' cannot be used ({why}): name a file of certificates in PEM."
    )


# As the microservice of release 1.4 came with it, and what else it read.
REPLACED = """
LLM_MODEL_NAME="Intel/neural-chat-7b-v3-3"
LLM_CONNECTOR="generic"
LLM_MODEL_SERVER="vllm"
LLM_MODEL_SERVER_ENDPOINT="http://vllm:8008/v1"
LLM_DISABLE_STREAMING="False"
LLM_OUTPUT_GUARD_EXISTS="True"
#LLM_USVC_PORT=9000
OPEA_LOGGER_LEVEL=INFO
LOGGING_PROPAGATE=true
"""


def test_a_replaced_services_own_file_of_settings_will_do(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(REPLACED)
    settings, _, warnings = load(file)

    assert (settings.model, settings.upstreams) == ("Intel/neural-chat-7b-v3-3", ("http://vllm:8008",))
    assert (settings.disable_streaming, settings.output_guard, settings.port) == (False, True, 9000)
    assert warnings == []


def test_every_setting_is_listed_with_its_default_and_meaning() -> None:
    rows = {name: (default, meaning) for name, default, meaning in table()}
    assert rows["GATEWAY_PORT, LLM_USVC_PORT"] == ("9000", "Port to listen on.")
    assert rows["GATEWAY_UPSTREAMS, LLM_MODEL_SERVER_ENDPOINT"][0] == "http://localhost:8008"
    assert all(meaning.endswith(".") for _, meaning in rows.values())


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_a_setting_is_read_by_its_older_name(alias: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_what_it_needs(field, monkeypatch, but=f"GATEWAY_{field.upper()}")
    monkeypatch.setenv(alias, RAW[field])
    settings, _, warnings = load()
    assert value_of(settings, field) == READ[field]
    assert warnings == []


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_the_name_beats_its_alias_with_a_warning_if_they_differ(
    alias: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"GATEWAY_{field.upper()}"
    set_what_it_needs(field, monkeypatch, but=f"GATEWAY_{field.upper()}")
    monkeypatch.setenv(alias, "1")
    monkeypatch.setenv(name, RAW[field])
    settings, _, (warning,) = load()
    assert value_of(settings, field) == READ[field]
    assert warning == f"{name} and {alias} are both set and differ: {name} is used."


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_a_name_and_an_alias_that_agree_are_no_cause_to_warn(quote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODEL", f"{quote}m{quote}")
    monkeypatch.setenv("LLM_MODEL_NAME", "m")
    assert load()[2] == []


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("field", ["port", "upstreams", "disable_streaming", "model"])
def test_quotes_around_a_value_are_taken_off(field: str, quote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GATEWAY_{field.upper()}", quote + RAW[field] + quote)
    assert value_of(load()[0], field) == READ[field]


@pytest.mark.parametrize("value", ["m'", '"', "'m\"", "a'm'"])
def test_quotes_that_are_no_pair_around_it_belong_to_the_value(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODEL", value)
    assert load()[0].model == value


@pytest.mark.parametrize("field", RAW)
@pytest.mark.parametrize("empty", ["", '""'])
def test_an_empty_value_is_none_at_all(field: str, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = value_of(Settings(), field)
    monkeypatch.setenv(f"GATEWAY_{field.upper()}", empty)
    settings, _, warnings = load()
    assert value_of(settings, field) == default
    assert warnings == []


@pytest.mark.parametrize("empty", ["", '""'])
def test_an_empty_value_lets_the_alias_speak(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODEL", empty)
    monkeypatch.setenv("LLM_MODEL_NAME", "m")
    settings, _, warnings = load()
    assert (settings.model, warnings) == ("m", [])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("GATEWAY_UPSTREAM", "GATEWAY_UPSTREAMS"),
        ("GATEWAY_PROT", "GATEWAY_PORT"),
        ("GATEWAY_IDLE_TIME_OUT", "GATEWAY_IDLE_TIMEOUT"),
        ("GATEWAY_PORTS", "GATEWAY_PORT"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    assert wrong() == f"{name} is not a setting of the gateway: did you mean {nearest}?"


@pytest.mark.parametrize("name", ["port", "host", "model", "upstreams", "gateway_port", "LLM_OTHER", "HOST", "PORT"])
def test_a_name_that_is_not_ours_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Settings().model_dump()
    monkeypatch.setenv(name, "7")
    assert load()[0].model_dump() == before


@pytest.mark.parametrize(
    ("name", "value", "service"),
    [
        ("GATEWAY_SERVICE_HOST", "10.0.0.1", "gateway"),
        ("GATEWAY_SERVICE_PORT", "9000", "gateway"),
        ("GATEWAY_SERVICE_PORT_HTTP", "9000", "gateway"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:9000", "gateway"),
        ("GATEWAY_PORT_9000_TCP", "tcp://10.0.0.1:9000", "gateway"),
        ("GATEWAY_PORT_9000_TCP_ADDR", "10.0.0.1", "gateway"),
        ("GATEWAY_PORT_9000_TCP_PORT", "9000", "gateway"),
        ("GATEWAY_METRICS_PORT", "tcp://10.0.0.1:9464", "gateway-metrics"),
        ("GATEWAY_METRICS_SERVICE_HOST", "10.0.0.1", "gateway-metrics"),
        ("GATEWAY_CANARY_PORT", "udp://10.0.0.1:9000", "gateway-canary"),
        ("LLM_USVC_PORT", "tcp://10.0.0.1:9000", "llm-usvc"),
    ],
)
def test_what_kubernetes_injects_is_ignored_and_told_of(
    name: str, value: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    settings, _, warnings = load()
    assert (settings.port, settings.metrics_port) == (9000, None)
    assert warnings == [
        f"the environment has variables of a Kubernetes Service named {service} ({name}={value}), which are no "
        "settings and ignored: set enableServiceLinks: false in the pod's spec, or give the Service another name."
    ]


def test_a_service_is_told_of_once_and_an_alias_still_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("GATEWAY_PORT", "tcp://10.0.0.1:9000")
    monkeypatch.setenv("LLM_USVC_PORT", "9100")
    settings, _, (warning,) = load()
    assert settings.port == 9100
    assert "named gateway (GATEWAY_PORT=tcp://10.0.0.1:9000)" in warning


@pytest.mark.parametrize("name", ["GATEWAY_SERVICE_NAME", "GATEWAY_PORT_NAME"])
def test_what_only_begins_as_a_services_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingsError, match=f"{name} is not a setting"):
        load()


def test_an_environment_of_kubernetes_does_not_hide_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("GATEWAY_PORT=9200\n")
    monkeypatch.setenv("GATEWAY_PORT", "tcp://10.0.0.1:9000")
    assert load(tmp_path / "env")[0].port == 9200


@pytest.mark.parametrize("set_name", names_of("model"))
@pytest.mark.parametrize("file_name", names_of("model"))
def test_the_command_line_beats_the_environment_and_that_the_file(
    set_name: str, file_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env").write_text(f'{file_name}="from the file"\nGATEWAY_HOST=::1\n')
    assert load(tmp_path / "env")[0].model == "from the file"
    monkeypatch.setenv(set_name, "from the environment")
    settings, *_ = load(tmp_path / "env")
    assert (settings.model, settings.host) == ("from the environment", "::1")
    assert load(tmp_path / "env", model="given", host=None)[0].model == "given"


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [("40s", 40), ("1m", 60), ("1m30s", 90), ("1h1m1s", 3661), ("45", 45), ("2.5", 2.5), ("1.5s", 1.5), ("500ms", 0.5)],
)
def test_a_grace_is_written_as_composes_or_in_seconds(
    raw: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_STOP_GRACE", raw)
    assert load()[0].stop_grace == seconds


@pytest.mark.parametrize(
    ("grace", "delay", "timeout", "warned"),
    [("40s", "0", "30", False), ("40s", "5", "32", False), ("40s", "6", "32", True), ("30", "0", "30", True)],
)
def test_a_drain_that_may_outlast_the_grace_is_warned_of(
    grace: str, delay: str, timeout: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_STOP_GRACE", grace)
    monkeypatch.setenv("GATEWAY_DRAIN_DELAY", delay)
    monkeypatch.setenv("GATEWAY_DRAIN_TIMEOUT", timeout)
    _, _, warnings = load()
    assert ["GATEWAY_STOP_GRACE): raise that" in warning for warning in warnings] == [True] * warned
    if warned:
        longest = int(delay) + int(timeout) + 3
        assert f"end in up to {longest} s, and it is killed after {grace.rstrip('s')} (" in warnings[0]


def test_a_warning_names_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("GATEWAY_MODEL=from-the-file\n")
    monkeypatch.setenv("LLM_MODEL_NAME", "from-the-environment")
    settings, _, (warning,) = load(tmp_path / "env")
    used = "LLM_MODEL_NAME" if settings.model == "from-the-environment" else "GATEWAY_MODEL"
    assert warning.endswith(f"{used} is used.")


def test_two_names_of_a_setting_of_the_model_server_that_differ_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env").write_text("VLLM_MAX_MODEL_LEN=2048\n")
    assert differing(ModelServerSettings, tmp_path / "env") == []
    monkeypatch.setenv("MAX_TOKENS", "1024")
    used = build(ModelServerSettings, tmp_path / "env").max_model_len
    name = {1024: "MAX_TOKENS", 2048: "VLLM_MAX_MODEL_LEN"}[used or 0]
    (sentence,) = differing(ModelServerSettings, tmp_path / "env")
    assert sentence.endswith(f"are both set and differ: {name} is used.")

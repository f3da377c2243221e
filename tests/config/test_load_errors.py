"""A wrong setting stops the start: with its name, its value and what is allowed, and never a secret."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.config.environment import SettingsError
from gateway.config.load import load
from gateway.config.secrets import token_client
from gateway.config.settings import Settings

HEADERS = "names of headers, separated by commas, but none that is the gateway's or one hop's own"
ORIGINS = "origins as https://app.example.com, without a path, separated by commas, or * alone"
OWN_HOSTS = "hosts as gateway.example.com, without a port, separated by commas"
TOKENS = ["GATEWAY_UPSTREAM_TOKEN_URL", "GATEWAY_UPSTREAM_CLIENT_ID", "GATEWAY_UPSTREAM_CLIENT_SECRET"]
TOKEN_URL = "a URL like https://login.example.com/token"
ALIASES = "NAME=MODEL[:WEIGHT], a name's further models behind commas, each name once"
NAME = "a name after dns+ that there can be: 1 to 63 characters between its dots, 253 in all"
URLS = "URLs like http://host:8008, separated by commas"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("GATEWAY_", "LLM_", "OPEA_")):
            monkeypatch.delenv(name)


def wrong(env_file: Path | None = None, **given: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        load(env_file, **given)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("GATEWAY_PORT", "abc", "a number"),
        ("GATEWAY_PORT", "9000.5", "a number"),
        ("GATEWAY_PORT", "65536", "less than or equal to 65535"),
        ("GATEWAY_PORT", "-1", "greater than or equal to 0"),
        ("LLM_USVC_PORT", "abc", "a number"),
        ("GATEWAY_DISABLE_STREAMING", "maybe", "true or false"),
        ("LLM_DISABLE_STREAMING", "maybe", "true or false"),
        ("GATEWAY_STREAM_STYLE", "xml", "'openai', 'repr' or 'answer_part'"),
        ("GATEWAY_MEDIA_DOMAINS", "http://a", "hosts as images.example.com, separated by commas"),
        ("GATEWAY_FORWARDED_HEADERS", "x-session-id,x-request-id", HEADERS),
        ("GATEWAY_FORWARDED_HEADERS", "Proxy-Mine", HEADERS),
        ("GATEWAY_FORWARDED_HEADERS", "x-session-id:", HEADERS),
        ("GATEWAY_CORS_ORIGINS", "app.example.com", ORIGINS),
        (
            "GATEWAY_ALLOWED_HOSTS",
            "a.example:9000",
            OWN_HOSTS,
        ),
        ("GATEWAY_ALLOWED_HOSTS", "*", OWN_HOSTS),
        ("GATEWAY_CORS_ORIGINS", "https://app.example.com/", ORIGINS),
        ("GATEWAY_CORS_ORIGINS", "*,https://a", ORIGINS),
        ("GATEWAY_COMPAT", "erag-3.0", "'erag-1.4', 'erag-2.0' or 'erag-2.1'"),
        ("GATEWAY_SYSTEM_ROLE", "user", "'system' or 'merge'"),
        ("GATEWAY_LOG_FORMAT", "xml", "'json' or 'text'"),
        ("OPEA_LOGGER_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
        ("GATEWAY_MAX_BODY_BYTES", "10", "greater than or equal to 1024"),
        ("GATEWAY_IDLE_TIMEOUT", "0", "greater than 0"),
        ("GATEWAY_IDLE_TIMEOUT", "soon", "a number"),
        ("GATEWAY_IDLE_TIMEOUT", "inf", "a finite number"),
        ("GATEWAY_CONNECT_TIMEOUT", "nan", "a finite number"),
        ("GATEWAY_DRAIN_TIMEOUT", "inf", "a finite number"),
        ("GATEWAY_STOP_GRACE", "soon", "a number"),
        ("GATEWAY_TRUSTED_PROXIES", "10.0.0.1/8", "addresses, or networks as 10.0.0.0/8 without bits past the mask"),
        ("GATEWAY_DRAIN_TIMEOUT", "-1", "greater than or equal to 0"),
        ("GATEWAY_UPSTREAMS", "vllm:8008", URLS),
        ("GATEWAY_UPSTREAMS", "ftp://vllm", URLS),
        ("GATEWAY_UPSTREAMS", "http://", URLS),
        ("GATEWAY_UPSTREAMS", "http://a:0", URLS),
        ("GATEWAY_UPSTREAMS", "http://a:99999", URLS),
        ("GATEWAY_UPSTREAMS", "http://a:8o", URLS),
        ("GATEWAY_UPSTREAMS", "http://[::1", URLS),
        ("GATEWAY_UPSTREAMS", "http://a?b=1", URLS),
        ("GATEWAY_UPSTREAMS", "dns+ftp://a", URLS),
        (
            "GATEWAY_UPSTREAMS",
            "dns+http://10.0.0.1:8000",
            "a name after dns+, whose addresses are asked for: an address needs no dns+",
        ),
        (
            "GATEWAY_UPSTREAMS",
            "dns+http://[::1]:8000",
            "a name after dns+, whose addresses are asked for: an address needs no dns+",
        ),
        ("GATEWAY_UPSTREAMS", "dns+http://a:1,dns+http://a:1/", "each URL once"),
        ("GATEWAY_UPSTREAMS", "dns+http://pods..svc:1", NAME),
        ("GATEWAY_UPSTREAMS", f"dns+http://{'a' * 64}.svc:1", NAME),
        ("GATEWAY_UPSTREAMS", f"dns+http://{'a.' * 127}svc:1", NAME),
        ("GATEWAY_UPSTREAMS", "http://a,b", URLS),
        ("GATEWAY_MODEL_ALIASES", "fast", ALIASES),
        ("GATEWAY_MODEL_ALIASES", "fast=", ALIASES),
        ("GATEWAY_MODEL_ALIASES", "a=b,a=c", ALIASES),
        ("GATEWAY_MODEL_ALIASES", "a=b,b", ALIASES),
        ("GATEWAY_MODEL_ALIASES", "a=b:0", f"{ALIASES}, and weights above 0"),
        ("LLM_MODEL_SERVER_ENDPOINT", ",", URLS),
        ("GATEWAY_UPSTREAMS", "http://a,http://a/v1", "each URL once"),
        ("GATEWAY_UPSTREAMS", "http://a\x7fb", "URLs of plain ASCII characters"),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "login.example.com/token", TOKEN_URL),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "ftp://login.example.com/token", TOKEN_URL),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "https:///token", TOKEN_URL),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "https://a:0/token", TOKEN_URL),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "https://a:99999/token", TOKEN_URL),
        ("GATEWAY_UPSTREAM_TOKEN_URL", "https://a/token#", TOKEN_URL),
        ("LLM_VLLM_TOKEN_URL", "https://a/to ken", "a URL of plain ASCII characters"),
    ],
)
def test_a_wrong_value_is_shown_with_its_name_and_what_is_allowed(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert wrong() == f"{name} is wrong: {value!r}. Allowed: {allowed}."


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("http://vllm:8008/v1", "http://vllm:8008"),
        ("http://vllm:8008/v1/", "http://vllm:8008"),
        ("https://vllm/some/prefix/", "https://vllm/some/prefix"),
        ("HTTP://10.0.0.7", "http://10.0.0.7"),
        ("http://[::1]:8008", "http://[::1]:8008"),
    ],
)
def test_a_url_is_read_in_every_usual_form(url: str, read: str) -> None:
    assert load(upstreams=url)[0].upstreams == (read,)


@pytest.mark.parametrize("upstreams", ["http://a,http://b", "http://a http://b", " http://a ,\n http://b, "])
def test_upstreams_are_separated_by_commas_or_blanks(upstreams: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAMS", upstreams)
    assert load()[0].upstreams == ("http://a", "http://b")


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "abc")
    monkeypatch.setenv("GATEWAY_LOG_FORMAT", "xml")
    assert [line.split()[0] for line in wrong().splitlines()] == ["GATEWAY_PORT", "GATEWAY_LOG_FORMAT"]


@pytest.mark.parametrize("other", ["", "tcp://10.0.0.1:9000"])
def test_the_alias_is_blamed_where_the_name_gave_no_value(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", other)
    monkeypatch.setenv("LLM_USVC_PORT", "abc")
    assert wrong() == "LLM_USVC_PORT is wrong: 'abc'. Allowed: a number."


@pytest.mark.parametrize("name", ["GATEWAY_PORT", "LLM_USVC_PORT"])
def test_a_wrong_value_in_the_file_is_shown_with_its_name_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"{name}=abc\n")
    assert wrong(tmp_path / "env") == f"{name} is wrong: 'abc'. Allowed: a number."


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("GATEWAY_UPSTREAM=http://a\n")
    assert wrong(tmp_path / "env").endswith("did you mean GATEWAY_UPSTREAMS?")


def test_a_wrong_value_of_the_command_line_is_not_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USVC_PORT", "9000")
    assert "LLM_USVC_PORT" not in wrong(port="abc")


def test_a_file_that_is_missing_or_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        assert str(path) in wrong(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(b"GATEWAY_MODEL=\xff\xfe\n")
    assert str(tmp_path / "env") in wrong(tmp_path / "env")


@pytest.mark.parametrize("name", ["GATEWAY_UPSTREAM_API_KEY", "LLM_VLLM_API_KEY"])
@pytest.mark.parametrize("key", ["hidden key", "hidden\u00e9", "hidden\r\nx: y"])
def test_a_wrong_api_key_is_not_in_the_error(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, key)
    assert wrong() == f"{name} is wrong: its value. Allowed: printable ASCII characters without spaces."


def test_the_api_key_is_neither_shown_by_the_settings_nor_by_an_error_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY", "hidden")
    settings, *_ = load()
    assert settings.upstream_api_key is not None
    assert settings.upstream_api_key.get_secret_value() == "hidden"
    assert "hidden" not in repr(settings) + str(settings) + str(settings.model_dump()) + settings.model_dump_json()
    monkeypatch.setenv("GATEWAY_PORT", "abc")
    assert "hidden" not in wrong()


def test_a_password_in_a_url_is_refused_and_not_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAMS", "http://user:hidden@vllm:8008")
    error = wrong()
    assert "GATEWAY_UPSTREAM_API_KEY" in error
    assert "hidden" not in error


def set_tokens(monkeypatch: pytest.MonkeyPatch, *names: str, url: str = "https://login.example.com/token") -> None:
    for name in names:
        monkeypatch.setenv(name, url if name.endswith("URL") else "hidden")


@pytest.mark.parametrize("given", [given for size in (1, 2) for given in itertools.combinations(TOKENS, size)])
def test_what_is_missing_to_ask_for_tokens_is_named(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    set_tokens(monkeypatch, *given)
    missing = " and ".join(name for name in TOKENS if name not in given)
    verb = "is" if len(given) == 2 else "are"
    assert wrong() == f"{missing} {verb} missing: tokens for the upstreams need all of {', '.join(TOKENS)}."


@pytest.mark.parametrize("given", [TOKENS, TOKENS[2:]])
def test_a_key_beats_tokens_with_a_warning(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_tokens(monkeypatch, *given)
    monkeypatch.setenv("LLM_VLLM_API_KEY", "key")
    settings, _, (warning,) = load()
    assert warning == f"GATEWAY_UPSTREAM_API_KEY and {given[0]} are both set: the key is used, and no token."
    assert token_client(settings) is None


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("https://login.example.com/token", False),
        ("http://127.0.0.1:8080/token", False),
        ("http://localhost/token", False),
        ("http://keycloak:8080/token", True),
        ("HTTP://keycloak:8080/token", True),
    ],
)
def test_a_token_server_without_tls_is_warned_of(url: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tokens(monkeypatch, *TOKENS, url=url)
    settings, _, warnings = load()
    assert ["GATEWAY_UPSTREAM_TOKEN_URL has no TLS" in warning for warning in warnings] == [True] * warned
    assert "hidden" not in repr(settings.upstream_client_secret) + repr(token_client(settings)).replace(
        "id='hidden'", ""
    )


def test_a_password_in_the_token_url_is_refused_and_not_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tokens(monkeypatch, *TOKENS, url="https://user:hidden@login.example.com/token")
    assert wrong() == (
        "GATEWAY_UPSTREAM_TOKEN_URL is wrong: its value. Allowed: a URL without a user or password; set "
        "GATEWAY_UPSTREAM_CLIENT_ID and _SECRET."
    )


def test_settings_of_no_environment_are_the_documented_defaults() -> None:
    settings, _, warnings = load()
    assert warnings == []
    assert settings == Settings()
    assert (settings.host, settings.port, settings.upstreams) == ("0.0.0.0", 9000, ("http://localhost:8008",))
    limits = (settings.connect_timeout, settings.first_token_timeout, settings.idle_timeout, settings.total_timeout)
    assert limits == (5, 300, 60, 1800)


def test_a_salt_for_each_key_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_CACHE_SALT", "key")
    assert wrong() == "GATEWAY_CACHE_SALT is key, but there are no keys: set GATEWAY_API_KEYS or GATEWAY_API_KEYS_FILE."

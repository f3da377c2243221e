"""The settings of the gateway: their names, defaults, meanings and allowed values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway.admission.keys import from_secrets
from gateway.config.environment import EnvironmentSettings
from gateway.config.urls import authority, token_url, upstream_url
from gateway.dialects.body_limits import DEEPEST
from gateway.dialects.erag import STYLES, Release
from gateway.dialects.streams import Style
from gateway.pool.aliases import Weights, from_words
from gateway.wire.client_address import Network
from gateway.wire.heads import NOT_TO_UPSTREAM
from gateway.wire.routes import NAMES

# The variable with the key that the command `chat` sends.
CLIENT_KEY = "GATEWAY_CHAT_KEY"
# The prefix of a value that names a file of upstreams.
IN_FILE = "@"
# Seconds that the calls still running at the drain's end get to write their error.
CLOSING_TIME = 3

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(EnvironmentSettings):
    """Settings of the gateway. Each can be set as `GATEWAY_…`; some have an older name as well."""

    model_config = SettingsConfigDict(alias_generator=lambda field: f"GATEWAY_{field.upper()}")

    host: str = Field("0.0.0.0", description="Address to listen on.")
    port: int = Field(
        9000,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("GATEWAY_PORT", "LLM_USVC_PORT"),
        description="Port to listen on.",
    )
    health_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        validation_alias=AliasChoices("GATEWAY_HEALTH_PORT", "PORT_HEALTH"),
        description="A second port, for platforms whose probes have one of their own.",
    )
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="A port for `/metrics` alone, which then asks for no key and is on no other."
    )
    tls_cert_file: Path | None = Field(
        None, description="Certificate, as PEM, by which all ports speak TLS; read again when it changes."
    )
    tls_key_file: Path | None = Field(None, description="Its key; unset: the same file.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call, separated by commas, or `*`; unset: no page of another origin."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts by which clients call, separated by commas; without keys on a loopback address, or where "
        "this is set, all but these, `localhost` and addresses get a 421.",
    )
    upstreams: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://localhost:8008",),
        validation_alias=AliasChoices("GATEWAY_UPSTREAMS", "LLM_MODEL_SERVER_ENDPOINT"),
        description="URLs of the vLLM servers, separated by commas; `dns+http://NAME:PORT`: each address of the name "
        "is one, as they come and go; `@FILE`: a file of them, read again when it changes.",
    )
    routing: Literal["prefix", "least"] = Field(
        "prefix",
        description="Which of several upstreams takes a prompt: `prefix`, the one that has had its beginning before, "
        "unless that is much busier than others; `least`, the least busy one.",
    )
    upstream_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_UPSTREAM_API_KEY", "LLM_VLLM_API_KEY"),
        description="Key sent to the vLLM servers; a client's own Authorization is never passed on.",
    )
    upstream_token_url: str | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_UPSTREAM_TOKEN_URL", "LLM_VLLM_TOKEN_URL"),
        description="Where OAuth tokens for the vLLM servers come from, by client credentials, in place of a key.",
    )
    upstream_client_id: str | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_UPSTREAM_CLIENT_ID", "LLM_VLLM_CLIENT_ID"),
        description="The gateway's name there.",
    )
    upstream_client_secret: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_UPSTREAM_CLIENT_SECRET", "LLM_VLLM_CLIENT_SECRET"),
        description="The gateway's secret there.",
    )
    upstream_ca_file: Path | None = Field(
        None,
        description="Certificates, as PEM, that the upstreams' and the token server's must be signed by; unset: the "
        "system's.",
    )
    tls_skip_verify: bool = Field(
        False,
        validation_alias=AliasChoices("GATEWAY_TLS_SKIP_VERIFY", "LLM_TLS_SKIP_VERIFY"),
        description="Take whatever certificate an upstream or the token server shows: for trials alone.",
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys, separated by commas, one of which a call must bring; unset: anyone may call."
    )
    api_keys_file: Path | None = Field(
        None,
        description="The same as a file of names, hashes and what each key may ask for, read again when it changes.",
    )
    cache_salt: Literal["off", "key"] = Field(
        "off",
        description="`key` gives each key a part of vLLM's prefix cache of its own, so that no timing tells what "
        "others asked; then no prefix is shared between keys.",
    )
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of proxies whose `X-Forwarded-For` says who calls, separated by commas; "
        "unset: who connects.",
    )
    model: str | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_MODEL", "LLM_MODEL_NAME"),
        description="Model of a simplified request that names none; unset: the first that is served and can chat.",
    )
    model_aliases: Annotated[Mapping[str, Weights], NoDecode] = Field(
        {},
        description="Other names of models, `NAME=MODEL`, separated by commas; `*=MODEL`: what is not served; "
        "`NAME=MODEL:9,OTHER:1`: nine calls of ten for one, the tenth for the other.",
    )
    route_headers: bool = Field(
        False,
        description="Answers say who gave them: `x-gateway-upstream`, which is a short hash of its URL, and "
        "`x-gateway-model`, with the other name by which it was asked for.",
    )
    stream_style: Style = Field(
        "openai", description="How simplified streams look; a request may say its own `stream_style`."
    )
    openai_format_streaming: bool | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_OPENAI_FORMAT_STREAMING", "LLM_OPENAI_FORMAT_STREAMING"),
        description="Release 2.0's choice of `openai` or `repr`, where no style is set; other releases had none.",
    )
    compat: Release | None = Field(
        None,
        description="`erag-1.4`, `erag-2.0` or `erag-2.1`: chat calls are taken and answered as that release did.",
    )
    forward_sampling: bool = Field(
        False,
        description="Send `top_k` and `repetition_penalty` on under `GATEWAY_COMPAT`: those releases dropped them.",
    )
    count_tokens: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Have vLLM tell the tokens of streams whose callers did not ask: `on` of all, `off` of none, "
        "`auto` of simplified ones, and of all where keys are set. Else they are estimated.",
    )
    routes: Annotated[tuple[str, ...], NoDecode] = Field(
        NAMES, description="Calls that are relayed, separated by commas; any other path does not exist."
    )
    connector: Literal["generic", "langchain"] = Field(
        "generic",
        validation_alias=AliasChoices("GATEWAY_CONNECTOR", "LLM_CONNECTOR"),
        description="`langchain` makes simplified calls completions, of their messages as one text.",
    )
    disable_streaming: bool = Field(
        False,
        validation_alias=AliasChoices("GATEWAY_DISABLE_STREAMING", "LLM_DISABLE_STREAMING"),
        description="Answer every simplified request and `/generate` whole, whatever is asked for.",
    )
    output_guard: bool = Field(
        False,
        validation_alias=AliasChoices("GATEWAY_OUTPUT_GUARD", "LLM_OUTPUT_GUARD_EXISTS"),
        description="The same, for a guard behind this that reads whole answers.",
    )
    system_role: Literal["system", "merge"] = Field(
        "system", description="`merge` puts the system text before the user's, for models that refuse a system role."
    )
    max_in_flight: int = Field(4096, ge=1, description="Most calls that run at the same time; more wait.")
    max_in_flight_per_upstream: int | None = Field(
        None, ge=1, description="Most calls that run at the same time on one upstream; unset: as many as in all."
    )
    key_max_in_flight: int | None = Field(
        None,
        ge=1,
        description="Most calls of a key that run at the same time, where its line in the file does not say; without "
        "keys, of an address.",
    )
    max_queue: int = Field(1024, ge=0, description="Most calls that wait; more are refused with 429.")
    queue_timeout: Seconds = Field(30, description="Seconds that a call may wait until it is refused with 429.")
    max_connections: int | None = Field(
        None, ge=1, description="Most clients that are connected; unset: by the descriptors that the process may open."
    )
    max_buffered_bytes: int | None = Field(
        None,
        ge=1024 * 1024,
        description="Most bytes of requests, answers and what is not yet written that are held in all; unset: half of "
        "the memory that the container may have, or 1 GiB.",
    )
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Largest request body, in bytes.")
    max_head_bytes: int = Field(64 * 1024, ge=1024, description="Largest head of a request, in bytes.")
    max_headers: int = Field(100, ge=8, description="Most headers of a request.")
    max_url_bytes: int = Field(8192, ge=64, le=65_000, description="Longest target of a request, in bytes.")
    max_n: int = Field(128, ge=1, description="Most answers that a call may ask for (`n`, `best_of`).")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Most tokens that a call may ask for; unset: as many as the model takes."
    )
    max_messages: int = Field(2048, ge=1, description="Most messages of a call, of all chats of a batch together.")
    max_inputs: int = Field(
        2048, ge=1, description="Most prompts, texts, documents or chats of one call; n times the prompts, too."
    )
    max_json_values: int = Field(
        1_000_000,
        ge=16_384,
        description="Most values of a request body; a tenth of them may be arrays and objects, and a tenth names.",
    )
    max_json_bytes: int = Field(
        3 * 1024 * 1024,
        ge=65_536,
        description="Longest request body, in bytes, when its strings of a kilobyte and more are not counted; half of "
        "that where it is not vLLM's own form.",
    )
    refused_fields: Annotated[tuple[str, ...], NoDecode] = Field(
        ("kv_transfer_params", "ec_transfer_params", "uuid"),
        description="Fields that no call may have, `none` for any. Two of these name hosts that vLLM calls; `uuid`, of "
        "content parts, names media, which vLLM then gives to whoever says that name.",
    )
    forwarded_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Headers that vLLM obeys, as `X-Session-ID`, and that clients may send it all the same, separated "
        "by commas.",
    )
    max_json_depth: int = Field(DEEPEST, ge=4, le=DEEPEST, description="Deepest nesting of a request body.")
    media_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Hosts that messages' images, sounds and videos may be fetched from; `data:` URLs always pass."
    )
    connect_timeout: Seconds = Field(5, description="Seconds to connect to an upstream.")
    upstream_max_age: Seconds = Field(
        3600,
        description="Seconds after which a connection to an upstream serves no more calls, so that all behind a "
        "balancer get some; a tenth more or less.",
    )
    upstream_max_requests: int = Field(
        1000, ge=1, description="Most calls and probes that a connection to an upstream serves; a tenth more or less."
    )
    tcp_keepalive: Seconds = Field(
        120,
        ge=4,
        le=32_000,
        description="Seconds without a word of a client's or an upstream's system after which a connection has ended.",
    )
    first_token_timeout: Seconds = Field(300, description="Seconds until the first byte of a streamed answer.")
    idle_timeout: Seconds = Field(60, description="Seconds between two reads of a streamed answer.")
    total_timeout: Seconds = Field(1800, description="Seconds for a whole call.")
    heartbeat_interval: Seconds | None = Field(
        None,
        description="Seconds of silence, in the queue, too, after which a stream gets a comment; its status is then "
        "200, whatever comes. Unset: none.",
    )
    header_timeout: Seconds = Field(
        30, description="Seconds from the connecting, or a request's first byte, to the end of its head."
    )
    body_timeout: Seconds = Field(
        30, description="Seconds between two reads of a request's body, and until it has come at 1 KiB/s."
    )
    client_write_timeout: Seconds = Field(30, description="Seconds in which a client must read some of its answer.")
    probe_interval: Seconds = Field(
        1, description="Seconds between two probes of an upstream; of more than 8 longer, for 20 a second in all."
    )
    drain_delay: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after SIGTERM that requests are still taken, while the health check says `draining`.",
    )
    drain_timeout: float = Field(
        30, ge=0, allow_inf_nan=False, description="Seconds that running answers get to end after SIGTERM."
    )
    stop_grace: Seconds | None = Field(
        None,
        description="Seconds, or as Compose's `1m30s`, after SIGTERM that the platform kills the gateway; what drains "
        "for longer is warned of at the start.",
    )
    shortcut: bool = Field(
        True, description="Serve the data path past ASGI, at less than half the cost; off, all goes through the app."
    )
    page: bool = Field(
        True, description="A page at `/` to talk from and to watch, fed by `/v1/status`; off, there is neither."
    )
    log_format: Literal["json", "text"] = Field("json", description="`json` for machines, `text` for people.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO",
        validation_alias=AliasChoices("GATEWAY_LOG_LEVEL", "OPEA_LOGGER_LEVEL"),
        description="Lines below this level are left out.",
    )

    @property
    def may_have_several(self) -> bool:
        """Whether there are, or may come to be, several upstreams."""
        return len(self.upstreams) > 1 or self.upstreams[0].startswith(("dns+", IN_FILE))

    @field_validator(
        "upstreams",
        "routes",
        "allowed_hosts",
        "api_keys",
        "cors_origins",
        "media_domains",
        "refused_fields",
        "forwarded_headers",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return re.split(r"[,\s]+", value.strip(", \t\n")) if isinstance(value, str) else value

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(ip_network(one) for one in re.split(r"[,\s]+", value.strip(", \t\n")))
        except ValueError:
            raise ValueError("addresses, or networks as 10.0.0.0/8 without bits past the mask") from None

    @field_validator("upstreams")
    @classmethod
    def _check_upstreams(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        urls = tuple(word if re.match(f"{IN_FILE}.", word) else upstream_url(word) for word in value)
        if len(set(urls)) != len(urls):
            raise ValueError("each URL once")
        return urls

    @field_validator("upstream_token_url")
    @classmethod
    def _check_token_url(cls, value: str | None) -> str | None:
        return None if value is None else token_url(value)

    @field_validator("routes")
    @classmethod
    def _check_routes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(NAMES):
            raise ValueError(f"some of {', '.join(NAMES)}, separated by commas")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_own_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[A-Za-z0-9._-]+", host) for host in value):
            raise ValueError("hosts as gateway.example.com, without a port, separated by commas")
        return value

    @field_validator("forwarded_headers")
    @classmethod
    def _check_headers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.lower() for name in value)
        if not all(
            re.fullmatch(r"(?!proxy-)[a-z0-9-]+", name) and name.encode() not in NOT_TO_UPSTREAM for name in names
        ):
            raise ValueError("names of headers, separated by commas, but none that is the gateway's or one hop's own")
        return names

    @field_validator("media_domains")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[A-Za-z0-9.-]+", host) for host in value):
            raise ValueError("hosts as images.example.com, separated by commas")
        return tuple(host.lower() for host in value)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value != ("*",) and not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*,]+", origin) for origin in value):
            raise ValueError("origins as https://app.example.com, without a path, separated by commas, or * alone")
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        from_secrets(secret.get_secret_value() for secret in value)
        return value

    @field_validator("connector", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _check_aliases(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return from_words(re.split(r"[,\s]+", value.strip(", \t\n")))

    @model_validator(mode="after")
    def _as_released(self) -> Self:
        if "stream_style" not in self.model_fields_set:
            chooses = self.compat in (None, "erag-2.0") and self.openai_format_streaming is not None
            if chooses:
                self.stream_style = "openai" if self.openai_format_streaming else "repr"
            elif self.compat is not None:
                self.stream_style = STYLES[self.compat]
        return self

    @field_validator("stop_grace", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        found = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if found is None or not value:
            return value
        hours, minutes, seconds, thousandths = (float(part or 0) for part in found.groups())
        return 3600 * hours + 60 * minutes + seconds + thousandths / 1000

    @field_validator("log_level", mode="before")
    @classmethod
    def _level(cls, value: Any) -> Any:
        return {"WARN": "WARNING"}.get(value.upper(), value.upper()) if isinstance(value, str) else value

    @field_validator("upstream_api_key")
    @classmethod
    def _header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("printable ASCII characters without spaces")
        return value


def own_url(settings: Settings) -> str:
    """The URL at which this machine reaches the gateway that has these settings."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "http" if settings.tls_cert_file is None else "https"
    return f"{scheme}://{authority(host, settings.port)}"


def names_of(field: str, settings: type[BaseSettings] = Settings) -> tuple[str, ...]:
    """The environment names of a field, in order of precedence."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(choice) for choice in alias.choices)
    return (alias,) if isinstance(alias, str) else (field,)


def table(kind: type[BaseSettings] = Settings) -> list[tuple[str, str, str]]:
    """Names, default and meaning of each setting of a class, for `vllm-gateway settings` and docs/settings.md."""
    rows = []
    for field, info in kind.model_fields.items():
        default = info.default
        shown = ",".join(default) if isinstance(default, tuple) else "" if default in (None, {}) else str(default)
        rows.append((", ".join(names_of(field, kind)), shown, info.description or ""))
    return rows

"""What can be set: names, defaults, meanings, and what each value may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from gateway.dialects.body_limits import DEEPEST
from gateway.dialects.erag import STYLES, Release
from gateway.dialects.text_stream import Style
from gateway.pool.keys import from_secrets
from gateway.wire.routes import NAMES

# Kubernetes puts these into every container beside a Service that is named `gateway`.
_KUBERNETES = re.compile(r"GATEWAY_(SERVICE_.*|PORT_\d.*)$")
# Where the command `chat` finds the key that it sends.
CLIENT_KEY = "GATEWAY_CHAT_KEY"


class SettingsError(Exception):
    """One or more settings are wrong; the text has a sentence for each, a line each."""


def _injected_by_kubernetes(name: str, value: str | None) -> bool:
    return bool(_KUBERNETES.match(name)) or (name == "GATEWAY_PORT" and bool(re.match(r"\w+://", value or "")))


def usable(found: Mapping[str, str | None]) -> dict[str, str]:
    """What counts: values without the quotes that `docker run --env-file` keeps; an empty one is no value."""
    unquoted = {
        name: re.sub(r"""^(["'])(.*)\1$""", r"\2", value, flags=re.DOTALL) for name, value in found.items() if value
    }
    return {name: value for name, value in unquoted.items() if value and not _injected_by_kubernetes(name, value)}


class _Environment(EnvSettingsSource):
    """The process's environment, of which only what is usable."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return usable(super()._load_env_vars())


class EnvironmentSettings(BaseSettings):
    """What all our settings share: they go by their exact names in the environment alone."""

    model_config = SettingsConfigDict(
        case_sensitive=True, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line beats the environment, the environment beats the file."""
        return init_settings, _Environment(settings_cls), dotenv_settings


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(EnvironmentSettings):
    """Settings of the gateway. Each can be given as `GATEWAY_…`; some have an older name as well."""

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
        None, description="Certificate, as PEM, by which all ports speak TLS; read again on SIGHUP."
    )
    tls_key_file: Path | None = Field(None, description="Its key; unset: the same file.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call, separated by commas, or `*`; unset: no page of another origin."
    )
    upstreams: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://localhost:8008",),
        validation_alias=AliasChoices("GATEWAY_UPSTREAMS", "LLM_MODEL_SERVER_ENDPOINT"),
        description="URLs of the vLLM servers, separated by commas.",
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
        None, description="The same as a file of names, hashes and requests a minute, read again on SIGHUP."
    )
    model: str | None = Field(
        None,
        validation_alias=AliasChoices("GATEWAY_MODEL", "LLM_MODEL_NAME"),
        description="Model of a simplified request that names none; unset: the one that the upstream serves.",
    )
    stream_style: Style = Field(
        "openai", description="How simplified streams look; a request may say its own `stream_style`."
    )
    compat: Release | None = Field(
        None,
        description="`erag-1.4` or `erag-2.1`: simplified calls get that release's stream style, fields and errors.",
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
    max_queue: int = Field(1024, ge=0, description="Most calls that wait; more are refused with 429.")
    queue_timeout: Seconds = Field(30, description="Seconds that a call may wait until it is refused with 429.")
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Largest request body, in bytes.")
    max_head_bytes: int = Field(64 * 1024, ge=1024, description="Largest head of a request, in bytes.")
    max_headers: int = Field(100, ge=8, description="Most headers of a request.")
    max_url_bytes: int = Field(8192, ge=64, le=65_000, description="Longest target of a request, in bytes.")
    max_n: int = Field(128, ge=1, description="Most answers that a call may ask for (`n`, `best_of`).")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Most tokens that a call may ask for; unset: as many as the model takes."
    )
    max_messages: int = Field(2048, ge=1, description="Most messages of a chat.")
    max_json_depth: int = Field(DEEPEST, ge=4, le=DEEPEST, description="Deepest nesting of a request body.")
    media_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Hosts that messages' images, sounds and videos may be fetched from; `data:` URLs always pass."
    )
    connect_timeout: Seconds = Field(5, description="Seconds to connect to an upstream.")
    first_token_timeout: Seconds = Field(300, description="Seconds until the first byte of a streamed answer.")
    idle_timeout: Seconds = Field(60, description="Seconds between two reads of a streamed answer.")
    total_timeout: Seconds = Field(1800, description="Seconds for a whole call.")
    header_timeout: Seconds = Field(
        30, description="Seconds from the connecting, or a request's first byte, to the end of its head."
    )
    body_timeout: Seconds = Field(
        30, description="Seconds between two reads of a request's body, and until it has come at 1 KiB/s."
    )
    client_write_timeout: Seconds = Field(30, description="Seconds in which a client must read some of its answer.")
    probe_interval: Seconds = Field(5, description="Seconds between two probes of an upstream that serves.")
    drain_delay: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after SIGTERM that requests are still taken, while the health check says `draining`.",
    )
    drain_timeout: float = Field(
        30, ge=0, allow_inf_nan=False, description="Seconds that running answers get to end after SIGTERM."
    )
    shortcut: bool = Field(
        True, description="Serve the data path past ASGI, at less than half the cost; off, all goes through the app."
    )
    page: bool = Field(
        True, description="A page at `/` to ask from and to watch, fed by `/v1/status`; off, there is neither."
    )
    log_format: Literal["json", "text"] = Field("json", description="`json` for machines, `text` for people.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO",
        validation_alias=AliasChoices("GATEWAY_LOG_LEVEL", "OPEA_LOGGER_LEVEL"),
        description="Lines below this level are left out.",
    )

    @field_validator("upstreams", "routes", "api_keys", "cors_origins", "media_domains", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return re.split(r"[,\s]+", value.strip(", \t\n")) if isinstance(value, str) else value

    @field_validator("upstreams")
    @classmethod
    def _check_upstreams(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        urls = tuple(base_url(url) for url in value)
        if len(set(urls)) != len(urls):
            raise ValueError("each URL once")
        return urls

    @field_validator("upstream_token_url")
    @classmethod
    def _check_token_url(cls, value: str | None) -> str | None:
        return None if value is None else _token_url(value)

    @field_validator("routes")
    @classmethod
    def _check_routes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(NAMES):
            raise ValueError(f"some of {', '.join(NAMES)}, separated by commas")
        return value

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

    @model_validator(mode="after")
    def _as_released(self) -> Self:
        if self.compat is not None and "stream_style" not in self.model_fields_set:
            self.stream_style = STYLES[self.compat]
        return self

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


class ModelServerSettings(EnvironmentSettings):
    """Settings of the local vLLM that `up` starts; the names are those of the systems that this replaces."""

    port: int = Field(8008, ge=1, le=65535, validation_alias="LLM_VLLM_PORT", description="Port of the model server.")
    model: str | None = Field(
        None,
        validation_alias="LLM_VLLM_MODEL_NAME",
        description="A hub's ORG/NAME or a folder; unset: the demo model.",
    )
    revision: str | None = Field(
        None, validation_alias="LLM_VLLM_MODEL_REVISION", description="A branch, a tag or a commit of it."
    )
    served_name: str | None = Field(
        None, validation_alias="SERVED_MODEL_NAME", description="The name that requests give as `model`."
    )
    python: Path | None = Field(
        None, validation_alias="LLM_VLLM_PYTHON", description="A Python that has a vLLM; unset: an environment of ours."
    )
    cpu_kvcache_space: int | None = Field(
        None, ge=1, validation_alias="VLLM_CPU_KVCACHE_SPACE", description="GiB of memory for the cache on the CPU."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] | None = Field(
        None, validation_alias="VLLM_DTYPE", description="Number format of the model; the demo model's is float32."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("VLLM_MAX_NUM_SEQS", "MAX_CONCURRENT_REQUESTS"),
        description="Most answers at the same time.",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("VLLM_MAX_MODEL_LEN", "MAX_TOKENS"),
        description="Most tokens of a prompt and its answer.",
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, validation_alias="MAX_CONCURRENT_TOKENS", description="Most tokens of one step over all answers."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        validation_alias=AliasChoices("GPU_MEMORY_UTILIZATION", "GPU_MEM_UTILIZATION", "GPU_MEM_ULTIIZATION"),
        description="The part of the GPU's memory that vLLM takes.",
    )
    eager: bool | None = Field(
        None, validation_alias="VLLM_EAGER", description="Start without compiling; unset: the demo model does."
    )
    tp_size: int | None = Field(None, ge=1, validation_alias="VLLM_TP_SIZE", description="Tensor parallel size.")
    pp_size: int | None = Field(None, ge=1, validation_alias="VLLM_PP_SIZE", description="Pipeline parallel size.")
    chat_template: str | None = Field(
        None, validation_alias="VLLM_CHAT_TEMPLATE", description="A chat template's file, for a model without one."
    )
    config: str | None = Field(None, validation_alias="VLLM_CONFIG", description="vLLM's own options in a YAML file.")
    app_config: Path | None = Field(
        None,
        validation_alias="VLLM_APP_CONFIG",
        description="vllm-app's config.json, of which the model counts where none is given.",
    )
    quantization: str | None = Field(
        None, validation_alias="QUANTIZATION", description="How the checkpoint is quantized, if vLLM does not see it."
    )
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        description="Token for the hub's restricted models.",
    )
    extra_args: str = Field("", validation_alias="EXTRA_ARGS", description="More of vLLM's options, as in a shell.")


def base_url(url: str) -> str:
    """`http://host:port[/prefix]`, without the `/v1` that some configurations carry. Raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("URLs like http://host:8008, separated by commas") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise ValueError("URLs like http://host:8008, separated by commas")
    if parts.username or parts.password:
        raise ValueError("URLs without a user or password; set GATEWAY_UPSTREAM_API_KEY for a key")
    if not re.fullmatch(r"[A-Za-z0-9._:\-\[\]]+", parts.netloc) or not re.fullmatch(r"[!-~]*", parts.path):
        raise ValueError("URLs of plain ASCII characters")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _token_url(url: str) -> str:
    """`https://host[:port]/path[?query]`; RFC 6749, 3.2: without a fragment."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("a URL like https://login.example.com/token") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "#" in url or port == 0:
        raise ValueError("a URL like https://login.example.com/token")
    if "@" in parts.netloc:
        raise ValueError("a URL without a user or password; set GATEWAY_UPSTREAM_CLIENT_ID and _SECRET")
    if not re.fullmatch(r"[!-~]+", url):
        raise ValueError("a URL of plain ASCII characters")
    return f"{parts.scheme}{url[len(parts.scheme) :]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def own_url(settings: Settings) -> str:
    """Where this machine reaches the gateway that has these settings."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "http" if settings.tls_cert_file is None else "https"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def names_of(field: str, settings: type[BaseSettings] = Settings) -> tuple[str, ...]:
    """The environment names of a field, the one that wins first."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(choice) for choice in alias.choices)
    return (alias,) if isinstance(alias, str) else (field,)


def table(kind: type[BaseSettings] = Settings) -> list[tuple[str, str, str]]:
    """Names, default and meaning of every setting of a kind, for `vllm-gateway settings` and the README."""
    rows = []
    for field, info in kind.model_fields.items():
        default = info.default
        shown = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
        rows.append((", ".join(names_of(field, kind)), shown, info.description or ""))
    return rows

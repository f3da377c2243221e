"""Reads the settings: the only reader of the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from gateway.config.environment import EnvironmentSettings, SettingsError, service_of, unquoted, usable
from gateway.config.secret_files import NAMES, paths
from gateway.config.secrets import Secrets, doubts_about_tokens, read_secrets
from gateway.config.settings import CLIENT_KEY, CLOSING_TIME, Settings, names_of

T = TypeVar("T", bound=EnvironmentSettings)
_Sources = tuple[Mapping[str, str], ...]


def load(env_file: str | Path | None = None, **given: Any) -> tuple[Settings, Secrets, list[str]]:
    """The gateway's settings, the secrets that they name, and the warnings about them.

    `given` comes from the command line and overrides the environment, which overrides `env_file`.
    Raises SettingsError for a wrong value, an unknown `GATEWAY_` name or a file that cannot be read.
    """
    sources = _sources(env_file)
    _refuse_unknown({name for source in sources for name in source})
    settings = build(Settings, env_file, **given)
    files = [path for source in _raw_sources(env_file) for path in paths(unquoted(source))]
    secrets = read_secrets(settings, lambda: build(Settings, env_file, **given), files)
    if settings.metrics_port is not None and settings.metrics_port in (settings.port, settings.health_port):
        raise SettingsError(f"GATEWAY_METRICS_PORT is wrong: {settings.metrics_port}. Allowed: a port of its own.")
    if settings.cache_salt == "key" and secrets.client_keys is None:
        raise SettingsError(
            "GATEWAY_CACHE_SALT is key, but there are no keys: set GATEWAY_API_KEYS or GATEWAY_API_KEYS_FILE."
        )
    doubts = (
        *doubts_about_tokens(settings, secrets.token_client),
        *_doubts_about_stopping(settings),
        *_doubts_about_services(os.environ),
        *_doubts_about_traces(),
    )
    return settings, secrets, [*_differing_names(Settings, sources), *doubts]


def asks_for_traces() -> bool:
    """Whether OpenTelemetry's own variables enable traces; its SDK reads these variables by itself."""
    given = usable(os.environ)
    exporters = re.split(r"[,\s]+", given.get("OTEL_TRACES_EXPORTER", "otlp").strip())
    return (
        any(name in given for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
        and given.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        and "otlp" in exporters
    )


def _doubts_about_traces() -> Iterable[str]:
    found = _found(("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"), [usable(os.environ)])
    if asks_for_traces() and found is not None and found[1] != "http/protobuf":
        yield f"{found[0]} is {found[1]}: traces go as http/protobuf, for which collectors listen on port 4318."


def _doubts_about_stopping(settings: Settings) -> Iterable[str]:
    longest = settings.drain_delay + settings.drain_timeout + CLOSING_TIME
    if settings.stop_grace is not None and longest > settings.stop_grace:
        yield (
            f"GATEWAY_DRAIN_DELAY and GATEWAY_DRAIN_TIMEOUT let the gateway end in up to {longest:g} s, and it is "
            f"killed after {settings.stop_grace:g} (GATEWAY_STOP_GRACE): raise that, or lower them."
        )


def _doubts_about_services(environment: Mapping[str, str]) -> Iterable[str]:
    found: dict[str, str] = {}
    for name, value in sorted(environment.items(), key=lambda item: len(item[0])):
        if service := service_of(name, value):
            found.setdefault(service, f"{name}={value}")
    for service, variable in found.items():
        yield (
            f"the environment has variables of a Kubernetes Service named {service} ({variable}), which are no "
            "settings and ignored: set enableServiceLinks: false in the pod's spec, or give the Service another name."
        )


def differing(kind: type[BaseSettings], env_file: str | Path | None) -> list[str]:
    """One sentence for each setting that is set under two names to different values. Raises SettingsError."""
    return list(_differing_names(kind, _sources(env_file)))


def child_environment(env_file: str | Path | None = None) -> dict[str, str]:
    """The environment of a child process: ours overrides the settings file, and secrets are given as values."""
    environment, *file = _sources(env_file)
    given = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in NAMES}
    secrets = {name: environment[name] for name in NAMES if name in environment}
    return {**(file[0] if file else {}), **given, **secrets}


def build(kind: type[T], env_file: str | Path | None, **given: Any) -> T:
    """An instance of `kind` from the command line, the environment and the file; raises SettingsError."""
    sources = _sources(env_file)
    overriding = {names_of(field, kind)[0]: value for field, value in given.items() if value is not None}
    try:
        return kind(_env_file=env_file, **overriding)
    except ValidationError as error:
        raise SettingsError("\n".join(_sentences(error, kind, (overriding, *sources)))) from None


def _sources(env_file: str | Path | None) -> _Sources:
    """The usable variables of the environment, then of the file; the earlier source overrides the later."""
    return tuple(usable(source) for source in _raw_sources(env_file))


def _raw_sources(env_file: str | Path | None) -> tuple[Mapping[str, str | None], ...]:
    if env_file is None:
        return (os.environ,)
    try:
        with open(env_file, encoding="utf-8") as file:
            return os.environ, dotenv_values(stream=file)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(
            f"The file of settings {str(env_file)!r} cannot be read ({why}): name one that can."
        ) from None


def _found(names: Iterable[str], sources: Iterable[Mapping[str, Any]]) -> tuple[str, Any] | None:
    """The effective name and value: from the first source that has any of the names, by the first name it has."""
    return next(((name, source[name]) for source in sources for name in names if name in source), None)


def _refuse_unknown(environment: Iterable[str]) -> None:
    known = [name for field in Settings.model_fields for name in names_of(field)]
    wrong = []
    for name in sorted(environment):
        if name.startswith("GATEWAY_") and name not in (*known, CLIENT_KEY):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            wrong.append(f"{name} is not a setting of the gateway: did you mean {near[0]}?")
    if wrong:
        raise SettingsError("\n".join(wrong))


def _differing_names(kind: type[BaseSettings], sources: _Sources) -> Iterable[str]:
    for field in kind.model_fields:
        names = names_of(field, kind)
        used = _found(names, sources)
        for other in names:
            found = _found([other], sources)
            if used and found and found[1] != used[1]:
                yield f"{used[0]} and {other} are both set and differ: {used[0]} is used."


def _sentences(error: ValidationError, kind: type[BaseSettings], sources: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=True):
        place = str(problem["loc"][0])
        field = next(field for field in kind.model_fields if place in (field, *names_of(field, kind)))
        name, _ = _found(names_of(field, kind), sources) or (names_of(field, kind)[0], None)
        # A value with an @ may contain a password.
        secret = "SecretStr" in str(kind.model_fields[field].annotation) or "@" in str(problem["input"])
        value = "its value" if secret else repr(problem["input"])
        yield f"{name} is wrong: {value}. Allowed: {_allowed(problem['type'], problem['msg'])}."


def _allowed(kind: str, message: str) -> str:
    if kind == "bool_parsing":
        return "true or false"
    if kind in ("int_parsing", "float_parsing"):
        return "a number"
    return message.removeprefix("Value error, ").removeprefix("Input should be ")

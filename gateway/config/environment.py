"""What counts of the environment, or of a file of settings, and how settings are read from it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway.config.secret_files import BadSecretFile, with_files

# What Kubernetes puts into the containers beside a Service that is named `gateway`, `gateway-…` or `llm-usvc`: names
# that no setting has, and `…_PORT`, which may be one, with a URL.
_SERVICES = re.compile(
    r"(GATEWAY(?:_\w+?)??|LLM_USVC)_(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?|(PORT))"
)


class SettingsError(Exception):
    """One or more settings are wrong; the text has a sentence for each, a line each."""


def service_of(name: str, value: str | None) -> str | None:
    """The Service that Kubernetes has made this variable of; None where it may be a setting."""
    found = _SERVICES.fullmatch(name)
    if found is None or (found[2] and not re.match(r"(tcp|udp|sctp)://", value or "")):
        return None
    return found[1].lower().replace("_", "-")


def unquoted(found: Mapping[str, str | None]) -> dict[str, str]:
    """What has a value, without the quotes that `docker run --env-file` keeps."""
    return {
        name: re.sub(r"""^(["'])(.*)\1$""", r"\2", value, flags=re.DOTALL) for name, value in found.items() if value
    }


def usable(found: Mapping[str, str | None]) -> dict[str, str]:
    """What counts: values without the quotes that `docker run --env-file` keeps; an empty one is no value.

    Secrets that are given as files are read. Raises SettingsError where one cannot be.
    """
    try:
        given = with_files(unquoted(found))
    except BadSecretFile as error:
        raise SettingsError(str(error)) from None
    return {name: value for name, value in given.items() if value and service_of(name, value) is None}


class _Environment(EnvSettingsSource):
    """The process's environment, of which only what is usable."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return usable(super()._load_env_vars())


class _File(DotEnvSettingsSource):
    """The file of settings, likewise."""

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
        assert isinstance(dotenv_settings, DotEnvSettingsSource)
        return init_settings, _Environment(settings_cls), _File(settings_cls, env_file=dotenv_settings.env_file)

"""Selects the usable variables of the environment or of a settings file, and reads settings from them."""

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

# Variables that Kubernetes sets in containers beside a Service named `gateway`, `gateway-…` or `llm-usvc`. No setting
# has these names except `…_PORT`, which may be a setting: the one from Kubernetes holds a URL.
_SERVICES = re.compile(
    r"(GATEWAY(?:_\w+?)??|LLM_USVC)_(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?|(PORT))"
)


class SettingsError(Exception):
    """One or more settings are wrong; the text has one sentence per wrong setting, each on its own line."""


def service_of(name: str, value: str | None) -> str | None:
    """The Service for which Kubernetes made this variable; None if the variable may be a setting."""
    found = _SERVICES.fullmatch(name)
    if found is None or (found[2] and not re.match(r"(tcp|udp|sctp)://", value or "")):
        return None
    return found[1].lower().replace("_", "-")


def unquoted(found: Mapping[str, str | None]) -> dict[str, str]:
    """The variables that have a value, without the quotes that `docker run --env-file` keeps."""
    return {
        name: re.sub(r"""^(["'])(.*)\1$""", r"\2", value, flags=re.DOTALL) for name, value in found.items() if value
    }


def usable(found: Mapping[str, str | None]) -> dict[str, str]:
    """The variables that may be settings, without the quotes that `docker run --env-file` keeps.

    An empty variable counts as unset. Secrets that are given as files are read. Raises SettingsError if such a file
    cannot be read.
    """
    try:
        given = with_files(unquoted(found))
    except BadSecretFile as error:
        raise SettingsError(str(error)) from None
    return {name: value for name, value in given.items() if value and service_of(name, value) is None}


class _Environment(EnvSettingsSource):
    """The usable variables of the process's environment."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return usable(super()._load_env_vars())


class _File(DotEnvSettingsSource):
    """The usable variables of the settings file."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return usable(super()._load_env_vars())


class EnvironmentSettings(BaseSettings):
    """Base of all our settings classes: a setting is found in the environment by its exact name only."""

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

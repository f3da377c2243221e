"""The upstreams, keys, tokens and certificates that the settings name, read once per start."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.admission.keys import Key
from gateway.config.environment import SettingsError
from gateway.config.keys_file import client_keys
from gateway.config.settings import Settings, names_of
from gateway.config.tls import own_tls, upstream_tls
from gateway.config.upstreams_file import Upstreams, read_upstreams
from gateway.config.urls import is_loopback
from gateway.upstream.credentials import TokenClient

_OF_TOKENS = ("upstream_token_url", "upstream_client_id", "upstream_client_secret")


@dataclass(frozen=True, slots=True)
class Secrets:
    """The upstreams, the client keys, our account at the token server, the CAs we trust, and our own certificate.

    A field is None if nothing is configured for it. `client_keys` are the API keys of clients, by their SHA-256.
    `upstream_tls` is for calls, probes and token requests. `files` hold the credentials for the upstreams and the CAs
    that we trust. `again` builds the settings from the current content of these files.
    """

    upstreams: Upstreams
    client_keys: dict[bytes, Key] | None
    token_client: TokenClient | None
    upstream_tls: ssl.SSLContext | None
    own_tls: ssl.SSLContext | None
    files: list[Path]
    again: Callable[[], Settings]


def read_secrets(
    settings: Settings, again: Callable[[], Settings] | None = None, files: Iterable[Path] = ()
) -> Secrets:
    """Read all that these settings name. Raises SettingsError for a part that is missing, unreadable or wrong.

    `again` builds the settings anew, from the current content of the `files` that hold their secrets.
    """
    tokens = token_client(settings)
    trusted = [] if settings.upstream_ca_file is None else [settings.upstream_ca_file]
    return Secrets(
        read_upstreams(settings),
        client_keys(settings),
        tokens,
        upstream_tls(settings, None if tokens is None else tokens.url),
        own_tls(settings),
        [*files, *trusted],
        again or (lambda: settings),
    )


def token_client(settings: Settings) -> TokenClient | None:
    """Our account at the token server; None if there is no token server or an API key is set.

    Raises SettingsError if only a part of the account is set.
    """
    url, name, secret = settings.upstream_token_url, settings.upstream_client_id, settings.upstream_client_secret
    if settings.upstream_api_key is not None:
        return None
    if url is not None and name is not None and secret is not None:
        return TokenClient(url, name, secret.get_secret_value())
    missing = [names_of(field)[0] for field in _OF_TOKENS if getattr(settings, field) is None]
    if len(missing) == len(_OF_TOKENS):
        return None
    raise SettingsError(
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: tokens for the upstreams need "
        f"all of {', '.join(names_of(field)[0] for field in _OF_TOKENS)}."
    )


def doubts_about_tokens(settings: Settings, client: TokenClient | None) -> Iterable[str]:
    """One warning for each token setting that may be a mistake."""
    given = [names_of(field)[0] for field in _OF_TOKENS if getattr(settings, field) is not None]
    if settings.upstream_api_key is not None and given:
        yield f"GATEWAY_UPSTREAM_API_KEY and {given[0]} are both set: the key is used, and no token."
    # RFC 6749, 3.2: a token endpoint must use TLS. Only a warning: in a cluster a service mesh or the like may add TLS.
    if client is not None and client.url.startswith("http:") and not is_loopback(urlsplit(client.url).hostname or ""):
        yield "GATEWAY_UPSTREAM_TOKEN_URL has no TLS: whoever is on the way there can read the client's secret."

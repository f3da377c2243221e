"""The TLS contexts for upstreams and for our own ports, from the certificates that the settings name."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

from gateway.config.environment import SettingsError
from gateway.config.settings import IN_FILE, Settings

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which `ssl` does not name.
_ANY_TIME = 0x200000
# In no TLS handshake does a side send more flights than this.
_FLIGHTS = 3


def upstream_tls(settings: Settings, token_url: str | None) -> ssl.SSLContext | None:
    """The TLS context of calls, probes and token requests.

    None if no URL that is called can have TLS, because reading all certificates takes 1.5 MB.

    Raises SettingsError for a file that cannot be read or holds no certificate.
    """
    called = settings.upstreams if token_url is None else (*settings.upstreams, token_url)
    if not any(url.removeprefix("dns+").startswith(("https:", IN_FILE)) for url in called):
        return None
    file = settings.upstream_ca_file
    try:
        return trusting(file, skip_verify=settings.tls_skip_verify)
    except (OSError, ssl.SSLError) as error:
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise SettingsError(
            f"GATEWAY_UPSTREAM_CA_FILE {str(file)!r} cannot be used ({why}): name a file of certificates in PEM."
        ) from None


def trusting(file: Path | None, *, skip_verify: bool) -> ssl.SSLContext:
    """A context that trusts the CAs in the file, or the system's if there is no file. Raises OSError.

    With `skip_verify` it accepts any certificate.
    """
    context = ssl.create_default_context(cafile=file)
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def own_tls(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context of our own ports; None if they do not use TLS.

    Raises SettingsError for files that cannot be read or do not belong together.
    """
    if settings.tls_cert_file is None:
        if settings.tls_key_file is not None:
            raise SettingsError("GATEWAY_TLS_KEY_FILE needs a certificate: set GATEWAY_TLS_CERT_FILE, too.")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Load the current certificate and key for new connections. Raises SettingsError."""
    certificate, key = settings.tls_cert_file, settings.tls_key_file
    assert certificate is not None
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one, too
        names = f"GATEWAY_TLS_CERT_FILE {str(certificate)!r}" + (f" with {str(key)!r}" if key else "")
        raise SettingsError(
            f"{names} cannot be used ({_certificate_fault(error)}): name a certificate and its key in PEM."
        ) from None


def ends_at(context: ssl.SSLContext) -> float | None:
    """When the context's certificate expires, in seconds since 1970; None if that cannot be found out.

    `ssl` decodes only a peer's certificate, so a client in memory connects to the context. The certificate may have
    expired already.
    """
    shown, seen = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(seen, shown, server_side=True)
    curious = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    curious.check_hostname = False
    curious.verify_mode = ssl.CERT_NONE
    try:
        leaf = _handshake(server, curious.wrap_bio(shown, seen)).getpeercert(binary_form=True)
        assert leaf is not None
        curious.load_verify_locations(cadata=leaf)
        curious.verify_mode = ssl.CERT_REQUIRED
        curious.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _ANY_TIME
        server = context.wrap_bio(seen := ssl.MemoryBIO(), shown := ssl.MemoryBIO(), server_side=True)
        told = _handshake(server, curious.wrap_bio(shown, seen)).getpeercert()
    except ssl.SSLError:
        return None
    return None if not told else float(ssl.cert_time_to_seconds(str(told["notAfter"])))


def _handshake(server: ssl.SSLObject, client: ssl.SSLObject) -> ssl.SSLObject:
    """The client, after the handshake of the two."""
    for one in (client, server) * _FLIGHTS:
        with contextlib.suppress(ssl.SSLWantReadError):
            one.do_handshake()
    return client


def _certificate_fault(error: OSError) -> str:
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return "no certificate and key without a password can be read there"

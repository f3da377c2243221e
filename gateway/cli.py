"""The command `vllm-gateway`: serve, up, demo-model, check."""

from __future__ import annotations

import sys
from typing import Any

import click

from gateway import config
from gateway.check import check as run_check
from gateway.check import runs_in_container
from gateway.server import CannotListen
from gateway.server import serve as run_server

_EPILOG = "Every setting is an environment variable; `vllm-gateway settings` lists them all."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@click.version_option(package_name="vllm-gateway")
def main() -> None:
    """A thin gateway in front of vLLM model servers."""


@main.command(epilog=_EPILOG)
@click.option(
    "--upstream", "upstreams", multiple=True, metavar="URL", help="A vLLM server; may be given several times."
)
@click.option("--host", help="Address to listen on.")
@click.option("--port", help="Port to listen on.")
@click.option("--env-file", type=click.Path(), help="A file of settings; the environment wins over it.")
def serve(upstreams: tuple[str, ...], env_file: str | None, **given: Any) -> None:
    """Serve, in front of a vLLM that already runs."""
    try:
        settings, warnings = config.load(env_file, upstreams=",".join(upstreams) or None, **given)
        run_server(settings, warnings)
    except (config.SettingsError, CannotListen) as error:
        _stop(error)


@main.command()
@click.option(
    "--upstream", "upstreams", multiple=True, metavar="URL", help="A vLLM server; may be given several times."
)
@click.option("--env-file", type=click.Path(), help="A file of settings; the environment wins over it.")
def check(upstreams: tuple[str, ...], env_file: str | None) -> None:
    """Say what the settings are, what is wrong, and how the upstreams are; exit 0 if a call would succeed."""
    try:
        settings, warnings = config.load(env_file, upstreams=",".join(upstreams) or None)
    except config.SettingsError as error:
        _stop(error, status=1)
    else:
        sys.exit(0 if run_check(settings, warnings, click.echo, in_container=runs_in_container()) else 1)


@main.command("settings")
def list_settings() -> None:
    """List every setting, its default and its meaning."""
    for names, default, meaning in config.table():
        click.echo(f"{names}{f' = {default}' if default else ''}\n    {meaning}")


def _stop(error: Exception, *, status: int = 2) -> None:
    for line in str(error).splitlines():
        click.echo(f"vllm-gateway: {line}", err=True)
    sys.exit(status)

"""The command line `vllm-gateway`: the options of every command, and the sentence for what is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from gateway.commands.serve import serve as run_server
from gateway.config.environment import SettingsError
from gateway.config.load import build, child_environment, differing, load
from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import CLIENT_KEY, Settings, own_url, table
from gateway.config.urls import base_url
from gateway.modelserver.preflight import CannotStart
from gateway.server.listener import CannotListen

_EPILOG = "Every setting is an environment variable; `vllm-gateway settings` lists them all."

_env_file = click.option("--env-file", type=click.Path(), help="A file of settings; the environment wins over it.")
_upstreams = click.option(
    "--upstream", "upstreams", multiple=True, metavar="URL", help="A vLLM server; may be given several times."
)

_vllm_python = click.option(
    "--vllm-python", "python", metavar="PATH", help="A Python that has a vLLM, for whatever device it is."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@click.version_option(package_name="vllm-gateway")
def main() -> None:
    """A thin gateway in front of vLLM model servers."""


@main.command(epilog=_EPILOG)
@_upstreams
@click.option("--host", help="Address to listen on.")
@click.option("--port", help="Port to listen on.")
@_env_file
def serve(upstreams: tuple[str, ...], env_file: str | None, **given: Any) -> None:
    """Serve, in front of a vLLM that already runs."""
    try:
        run_server(*load(env_file, upstreams=",".join(upstreams) or None, **given))
    except (SettingsError, CannotListen) as error:
        _stop(error)


@main.command(epilog=_EPILOG)
@click.option(
    "--model",
    metavar="ORG/NAME|FOLDER|TARBALL|s3://…",
    help="The model to serve, also from `download`'s tarball or `upload`'s bucket; without it a tiny demo model.",
)
@_vllm_python
@_env_file
def up(model: str | None, python: str | None, env_file: str | None) -> None:
    """Serve, with a local vLLM that starts and ends with the gateway.

    Without --vllm-python that is vLLM for the CPU, installed once into the user's cache. Ctrl-C ends both, with exit
    status 0; where one of them ends by itself, the other is ended, with 1.
    """
    # Here, as its progress display (rich) takes megabytes that `serve` need not have.
    from gateway.commands.up import up as run_both

    try:
        environ = child_environment(env_file)
        # What is tried out on a laptop is not for its whole network.
        environ.setdefault("GATEWAY_HOST", "127.0.0.1")
        model_server = build(ModelServerSettings, env_file, model=model, python=python)
        warnings = differing(ModelServerSettings, env_file)
        # Its warnings are told by the gateway itself, which is another process.
        settings, *_ = load(env_file, host=environ["GATEWAY_HOST"])
    except SettingsError as error:
        _stop(error)
    else:
        for warning in warnings:
            click.echo(f"vllm-gateway: warning: {warning}", err=True)
        sys.exit(run_both(model_server, settings, environ))


def _text(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it is not UTF-8.") from None
    return value


def _key(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value):
        raise click.BadParameter("a key is of printable ASCII characters without spaces.")
    return value


def _url(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else base_url(value)
    except ValueError:
        raise click.BadParameter("a gateway is named as http://host:9000, without a user or password.") from None


_gateway_url = click.option(
    "--url", metavar="URL", callback=_url, help="The gateway; else where this machine's settings have it."
)
_gateway_key = click.option(
    "--key",
    envvar=CLIENT_KEY,
    show_envvar=True,
    callback=_key,
    help="One of the gateway's keys. Better in the environment: others can read a command line.",
)


@main.command(
    epilog="""\b
Exit status: 0 answered, or a conversation was left; 1 the gateway or the model refused, or the
answer broke off; 2 wrong usage; 3 the gateway cannot be reached; 130 stopped by Ctrl-C; 141 nobody
reads the answer any more."""
)
@click.argument("prompt", required=False, callback=_text)
@_gateway_url
@_gateway_key
@click.option("--model", callback=_text, help="One of those served; without it the gateway chooses.")
@click.option("--system", metavar="TEXT", callback=_text, help="What the model is told before all else.")
@click.option(
    "--context",
    "files",
    multiple=True,
    metavar="FILE",
    help="A text to answer from, cited below the answer; may be given several times.",
)
@click.option("--max-tokens", "max_new_tokens", type=click.IntRange(1), help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0), help="How freely the model chooses its words.")
@click.option("--json", "as_json", is_flag=True, help="Each answer, or what failed, as one line of JSON.")
def chat(
    prompt: str | None,
    url: str | None,
    key: str | None,
    system: str | None,
    files: tuple[str, ...],
    as_json: bool,
    **fields: Any,
) -> None:
    """Ask a running gateway, and show the answer while it comes.

    What is piped in is asked, too, below the PROMPT and a blank line. With neither, it is a conversation, in
    which Ctrl-C stops an answer, and Ctrl-D or /exit leaves. Notes and errors go to standard error.
    """
    from gateway.commands import chat as client

    try:
        documents = client.read_documents(files)
        asked = client.read_prompt(prompt)
        url = url or own_url(build(Settings, None))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except SettingsError as error:
        _stop(error)
    except KeyboardInterrupt:
        sys.exit(client.STOPPED)
    else:
        given = {name: value for name, value in fields.items() if value is not None}
        sys.exit(client.run(client.ChatOptions(url, key, system, given, as_json, documents), asked))


@main.command(
    epilog="""\b
Exit status: 0 all are answered; 1 some failed, or the gateway refuses the key, or the output takes no
more; 2 wrong usage or input, of which nothing was sent; 3 the gateway cannot be reached; 130 stopped
by Ctrl-C or SIGTERM; 141 nobody reads the results any more."""
)
@click.argument("source", metavar="INPUT.jsonl", callback=_text)
@click.option("-o", "--output", metavar="OUTPUT.jsonl", required=True, callback=_text, help="Where the results go.")
@_gateway_url
@_gateway_key
@click.option(
    "--max-concurrency",
    "most",
    type=click.IntRange(1, 1000),
    default=64,
    show_default=True,
    help="Most requests at a time.",
)
@click.option("--model", callback=_text, help="Ask this one, whatever the lines say.")
def batch(url: str | None, **given: Any) -> None:
    """Send each line of a file through a running gateway, in the form of OpenAI's batches.

    Results are appended to the output as they come. Run again, it goes on: what has an answer is not sent, what failed
    is. INPUT and OUTPUT may be -, for pipes. Notes and progress go to standard error.
    """
    from gateway.batch.input_file import BadInput
    from gateway.batch.output_file import BadOutput
    from gateway.commands import batch as command

    try:
        options = command.BatchOptions(url=url or own_url(build(Settings, None)), **given)
        sys.exit(command.batch(options, _warn))
    except KeyboardInterrupt:
        sys.exit(command.STOPPED)
    except (BadInput, BadOutput, SettingsError) as error:
        _stop(error)


@main.command(
    epilog="""\b
Exit status: 0 it fits, on one of the plans at least; 1 it does not; 2 the model or what was asked
is wrong; 130 stopped by Ctrl-C. The tokens are counted as vLLM 0.32 does; what it takes beside the
weights is measured, so that the cache is told as a low, a likely and a high figure."""
)
@click.argument("model", metavar="ORG/NAME|FOLDER", callback=_text)
@click.option("--revision", callback=_text, help="A branch, a tag or a commit of the model.")
@click.option("--gpu", metavar="NAME|GiB", callback=_text, help="As A10G or 24GiB; else this machine's.")
@click.option("--gpus", type=click.IntRange(1, 1024), help="Most GPUs; else 8, or as many as this machine has.")
@click.option("--max-model-len", type=click.IntRange(1), help="Tokens of a request; else the model's most.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="Number format of the cache.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Number format of the model.",
)
@click.option("--quantization", type=click.Choice(["fp8"]), help="Quantize while loading.")
@click.option(
    "--gpu-memory-utilization",
    "utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.92,
    show_default=True,
    help="The part of the memory that vLLM takes.",
)
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Such requests at once.")
@click.option("--plans", type=click.Path(path_type=Path), help="A platform's plans, as YAML, in place of --gpu.")
@click.option("--json", "as_json", is_flag=True, help="As one line of JSON.")
def plan(
    model: str,
    revision: str | None,
    gpu: str | None,
    gpus: int | None,
    plans: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Say whether a model fits, on how many GPUs, and with which of vLLM's options.

    Of a hub's model only config.json and the headers of its weights are fetched.
    """
    from gateway.commands import plan as command
    from gateway.sizing.architecture import BadConfig
    from gateway.sizing.plan import CannotPlan
    from gateway.sizing.plans_file import BadPlans
    from gateway.sizing.safetensors import BadCheckpoint

    if plans and (gpu or gpus):
        raise click.UsageError("--plans says which GPUs there are: leave --gpu and --gpus out.")
    try:
        options = command.PlanOptions(model, revision, gpu, gpus, plans, as_json, wanted)
        sys.exit(command.plan(options, child_environment(), click.echo, _warn))
    except KeyboardInterrupt:
        # Click's own status for it says here that the model does not fit.
        sys.exit(128 + signal.SIGINT)
    except (BadCheckpoint, BadConfig, BadPlans, CannotPlan, SettingsError) as error:
        _stop(error)


@main.command("gpus", epilog="The memory is what CUDA finds on a card, which is less than its box says.")
@click.argument("wanted", metavar="[NAME|CAPABILITY]", required=False, callback=_text)
@click.option("--json", "as_json", is_flag=True, help="As one line of JSON.")
def list_gpus(wanted: str | None, as_json: bool) -> None:
    """List NVIDIA's GPUs, the vLLM that runs on each, and those of this machine."""
    from gateway.commands.gpus import gpus
    from gateway.sizing.gpus import UnknownGpu

    try:
        sys.exit(gpus(wanted, click.echo, _warn, as_json=as_json))
    except UnknownGpu as error:
        _stop(error)


_model_name = click.argument("model", metavar="ORG/NAME", callback=_text)
_FORMATS = ["safetensors", "bin", "pt", "gguf"]


@main.command(
    epilog="""\b
Exit status: 0 all files are there, and their hashes are right; 1 something failed; 2 wrong usage;
130 stopped by Ctrl-C. The same command goes on where the last one ended, within a file, too.
HF_TOKEN opens restricted models, HF_ENDPOINT names another hub, HF_HUB_CACHE the cache."""
)
@_model_name
@click.option("--revision", default="main", show_default=True, callback=_text, help="A branch, a tag or a commit.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only files like *.json; may be given several times.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No files like *.bin; may be given several times.")
@click.option("--format", type=click.Choice(_FORMATS), help="Weights of this format alone; all that is no weights.")
@click.option(
    "--max-workers", type=click.IntRange(1, 64), default=8, show_default=True, help="Files that are fetched at once."
)
@click.option("--local-dir", type=click.Path(path_type=Path), help="A folder to put them into, in place of the cache.")
@click.option("--save-as-tarfile", is_flag=True, help="Write NAME.tar, too, into this folder.")
@click.option("--tarfile-name", metavar="NAME", help="Another name of it, without .tar.")
@click.option("--gzip", is_flag=True, help="Write NAME.tar.gz.")
def download(**given: Any) -> None:
    """Fetch a model from a hub into its cache, a folder or a tarball, and print where it is.

    Each file is checked by the hub's own hash of it. A tarball is the same bytes each time; unpacked, it is a cache
    for HF_HUB_CACHE, and `up --model NAME.tar` serves it.
    """
    from gateway.commands import models

    options = models.DownloadOptions(**given)
    if options.local_dir and options.save_as_tarfile:
        raise click.UsageError("--local-dir and --save-as-tarfile are two places: leave one of them out.")
    if not options.save_as_tarfile and (options.gzip or options.tarfile_name is not None):
        raise click.UsageError("--tarfile-name and --gzip are for --save-as-tarfile.")
    with _moving(models.KEPT):
        models.download(options, child_environment(), click.echo)


@main.command(
    epilog="""\b
Exit status: 0 all of it is there; 1 something failed; 2 wrong usage; 130 stopped by Ctrl-C.
Credentials and region are those of AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION and all else that
boto3 knows."""
)
@click.argument("source", metavar="FILE|FOLDER", type=click.Path(path_type=Path))
@click.argument("address", metavar="s3://BUCKET[/PREFIX]", callback=_text)
@click.option("--family", callback=_text, help="The name to keep it under; else the model's own.")
@click.option("--revision", callback=_text, help="Its commit, of which seven letters count; else what it says itself.")
@click.option("--endpoint-url", metavar="URL", envvar="AWS_ENDPOINT_URL", show_envvar=True, help="Another than AWS's.")
@click.option("--overwrite", is_flag=True, help="Write over what is there, and remove what the folder does not have.")
def upload(**given: Any) -> None:
    """Write a model into a bucket, as PREFIX/models/FAMILY/REVISION/…, and print its address.

    A folder goes up file by file, config.json last, so that nobody serves half of it: `up --model s3://…` takes the
    address. Of two that write at once, one is refused, where the server can.
    """
    from gateway.commands import models

    with _moving(models.NOT_WRITTEN):
        models.upload(models.UploadOptions(**given), click.echo)


@main.command("serving-template", epilog="docs/models.md has the way to it: the image, the artifact, the first answer.")
@_model_name
@click.option("--image", required=True, callback=_text, help="The image with vLLM and the gateway, in your registry.")
@click.option("--resource-plan", "plan", default="infer2.l", show_default=True, callback=_text, help="The platform's.")
@click.option("--revision", callback=_text, help="A commit of the artifact; else the one that it is of.")
@click.option("--artifact", callback=_text, help="The input artifact's name, of letters, digits and _.")
def serving_template(**given: Any) -> None:
    """Print the ServingTemplate by which SAP AI Core serves a model."""
    from gateway.commands import models

    with _moving(""):
        click.echo(models.serving_template(**given), nl=False)


@contextlib.contextmanager
def _moving(stopped: str) -> Iterator[None]:
    """What stops a command that moves models, told in a sentence."""
    from gateway.models import ModelError

    try:
        yield
    except (ModelError, SettingsError) as error:
        _stop(error, status=1)
    except KeyboardInterrupt:
        click.echo(f"vllm-gateway: {stopped}", err=True)
        sys.exit(128 + signal.SIGINT)


@main.command("demo-model")
@click.argument("folder", type=click.Path(path_type=Path))
def demo_model(folder: Path) -> None:
    """Write the demo model to FOLDER, readable by all."""
    from gateway.modelserver.demo_model import write_demo_model

    try:
        write_demo_model(folder, child_environment())
    except CannotStart as error:
        _stop(error, status=1)


@main.command(epilog="Needs no GPU. What the dataset's name ends with says what it is: .jsonl, .csv, .parquet, .pkl.")
@click.argument("model", metavar="ORG/NAME|FOLDER")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", help="A branch, a tag or a commit of the model.")
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Calibrate with this: columns question and system_prompt. A GPU alone serves what comes of it.",
)
@click.option(
    "--samples", type=click.IntRange(1), default=512, show_default=True, help="Most questions of the dataset."
)
@click.option("--length", type=click.IntRange(1), default=2048, show_default=True, help="Most tokens of each.")
@_vllm_python
def quantize(folder: Path, python: str | None, **given: Any) -> None:
    """Write the model's checkpoint in FP8 to FOLDER.

    Without a dataset it is FP8_DYNAMIC, which the CPU serves, too. llm-compressor is installed once.
    """
    from gateway.modelserver import quantizing

    try:
        wanted = quantizing.Quantizing(folder=folder, **given)
        quantizing.quantize(wanted, child_environment(), Path(python) if python else None)
    except CannotStart as error:
        _stop(error, status=1)


@main.command()
@_upstreams
@_env_file
@click.option("--json", "as_json", is_flag=True, help="All of it as one line of JSON.")
def check(upstreams: tuple[str, ...], env_file: str | None, as_json: bool) -> None:
    """Say whether a call would succeed (exit 0, else 1), how the upstreams are, and what is set.

    Where no upstream is named and `up` runs on this machine, its gateway is asked, whatever its ports and model are.
    """
    from gateway.cache import running
    from gateway.commands import check as command
    from gateway.modelserver.install import cache_folder

    try:
        loaded = load(env_file, upstreams=",".join(upstreams) or None)
        folder = running.folder_in(cache_folder(child_environment(env_file)))
    except SettingsError as error:
        if as_json:
            wrong = {"ok": False, "verdict": "The gateway would not start.", "errors": str(error).splitlines()}
            click.echo(json.dumps(wrong))
            sys.exit(1)
        _stop(error, status=1)
    else:
        findings = command.examine(*loaded, running.found(folder), in_container=command.runs_in_container())
        for line in [json.dumps(findings._asdict())] if as_json else command.lines(findings):
            click.echo(line)
        sys.exit(0 if findings.ok else 1)


@main.group(epilog="Without --file it is that of GATEWAY_API_KEYS_FILE, as the environment or --env-file has it.")
def keys() -> None:
    """Add, list and revoke the keys by which clients may call.

    Of a key the file has its hash alone. A gateway that runs reads it again within seconds.
    """


_keys_file = click.option("--file", type=click.Path(path_type=Path), help="The file of keys.")
_name = click.argument("name")


def _limit(option: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(option, type=click.IntRange(1, 999_999_999), help=f"{what}; without it any number.")


@keys.command("add")
@_name
@_limit("--requests", "Most requests a minute")
@_limit("--tokens", "Most tokens a minute")
@_limit("--in-flight", "Most calls that run at a time")
@_limit("--waiting", "Most calls that wait at a time")
@click.option("--models", metavar="A,B", help="The models that it may ask for; without it all.")
@_keys_file
@_env_file
def add_key(name: str, file: Path | None, env_file: str | None, **limits: Any) -> None:
    """Make a key for NAME, which the log then gives, and write it to standard output: this once."""
    from gateway.commands import keys as command

    with _keys_in(file, env_file) as found:
        key = command.add(found, name, command.Limits(**limits))
        click.echo(f"The key of {name}, which is shown this once: {found} has its hash. {_REREAD}", err=True)
        click.echo(key)


@keys.command("list")
@_keys_file
@_env_file
def list_keys(file: Path | None, env_file: str | None) -> None:
    """List names, the beginnings of hashes, and limits."""
    from gateway.commands import keys as command

    with _keys_in(file, env_file) as found:
        for line in command.listed(found):
            click.echo(line)


@keys.command("revoke")
@_name
@_keys_file
@_env_file
def revoke_key(name: str, file: Path | None, env_file: str | None) -> None:
    """Remove the key of NAME from the file."""
    from gateway.commands import keys as command

    with _keys_in(file, env_file) as found:
        command.revoke(found, name)
        click.echo(f"{found} has no key of {name} any more. {_REREAD}", err=True)


_REREAD = "A gateway that runs has read it within seconds; its log says so."


@contextlib.contextmanager
def _keys_in(file: Path | None, env_file: str | None) -> Iterator[Path]:
    """The file of keys; what is wrong with it ends the command."""
    from gateway.commands.keys import KeysError

    try:
        file = file or build(Settings, env_file).api_keys_file
        if file is None:
            raise SettingsError("Name the file of keys: by --file, or GATEWAY_API_KEYS_FILE.")
        yield file
    except SettingsError as error:
        _stop(error)
    except KeysError as error:
        _stop(error, status=1)


@main.command(
    epilog="What `docker compose logs` and `kubectl logs` show will do, with timestamps and prefixes or without."
)
@click.argument("logs", nargs=-1, required=True, metavar="LOG...")
@click.option("--csv", "as_csv", is_flag=True, help="For a program or a spreadsheet.")
def usage(logs: tuple[str, ...], as_csv: bool) -> None:
    """Sum the calls and tokens of a gateway's logs by day (in UTC), key and model.

    A LOG is a file, plain or gzip's, or - for standard input. Notes go to standard error.
    """
    from gateway.commands import usage as command

    try:
        found = command.read(logs)
    except command.UsageError as error:
        _stop(error, status=1)
    else:
        for note in found.notes():
            click.echo(f"vllm-gateway: {note}", err=True)
        for text in [command.as_csv(found).rstrip("\n")] if as_csv else command.as_table(found):
            click.echo(text)


@main.command()
@click.option("--yes", is_flag=True, help="Remove without asking, as a script must.")
def clean(yes: bool) -> None:
    """List what `up`, `quantize` and the benchmark keep in the user's cache folder, and remove it."""
    from gateway.cache import cleaning as command
    from gateway.modelserver.install import cache_folder

    cache = cache_folder(child_environment())
    listed = command.entries(cache)
    if not listed:
        click.echo(f"{cache} has nothing of the gateway.")
        return
    for line in command.lines(listed):
        click.echo(line)
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("Nothing is removed: there is no terminal to ask at, and --yes was not given.")
    if not yes and not click.confirm(f"Remove this from {cache}?"):
        return
    try:
        command.remove(cache, listed)
    except command.CannotClean as error:
        _stop(error, status=1)
    click.echo(f"{cache} {'has nothing of the gateway any more' if cache.exists() else 'is removed'}.")


@main.command("settings")
def list_settings() -> None:
    """List every setting, its default and its meaning."""
    for kind, title in ((Settings, "The gateway:"), (ModelServerSettings, "The model server of `up`:")):
        click.echo(title)
        for names, default, meaning in table(kind):
            click.echo(f"  {names}{f' = {default}' if default else ''}\n      {meaning}")


def _hide_what_cannot_run(is_linux: bool, locks: Path) -> None:
    """Take away the commands that install a model server where there is no vLLM for the system, or nothing to go by.

    As in the gateway's image, which has no locks: what it starts with is all that it has.
    """
    if not is_linux or not locks.is_dir():
        for name in ("up", "quantize", "demo-model"):
            main.commands.pop(name, None)


_hide_what_cannot_run(sys.platform == "linux", Path(__file__).with_name("modelserver") / "locks")


def _warn(sentence: str) -> None:
    click.echo(f"vllm-gateway: {sentence}", err=True)


def _stop(error: Exception, *, status: int = 2) -> None:
    for line in str(error).splitlines():
        click.echo(f"vllm-gateway: {line}", err=True)
    sys.exit(status)

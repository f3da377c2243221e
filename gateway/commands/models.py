"""The commands `download`, `upload` and `serving-template`: their options, steps and progress display."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gateway.models import ModelError, shown
from gateway.progress import Display

# Seconds over which a rate is measured.
_WINDOW = 10
KEPT = "Stopped. What has come is kept, and the same command goes on from there."
NOT_WRITTEN = "Stopped. What was on its way is not there, and the model is not whole: the same command writes it anew."


class DownloadOptions(NamedTuple):
    """The options of `download`."""

    model: str
    revision: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    format: str | None
    max_workers: int
    local_dir: Path | None
    tarfile_name: str | None
    save_as_tarfile: bool
    gzip: bool


@contextlib.contextmanager
def extra(command: str) -> Iterator[None]:
    """Turn the ImportError of a library of the extra into a ModelError that says what to install."""
    try:
        yield
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "gateway"):
            raise
        raise ModelError(
            f"`{command}` needs {library}, which is not installed: pip install 'vllm-gateway[models]'."
        ) from None


def download(options: DownloadOptions, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Download a model, and `say` where it is. Raises ModelError."""
    with extra("download"):
        from gateway.models import download as steps
        from gateway.models import tarball
        from gateway.models.hub import Hub
        from gateway.models.places import Folder, HubCache, Place
        from gateway.models.selection import Wanted, select
    display = _display()
    target = None
    if options.save_as_tarfile:
        name = options.model.rpartition("/")[2] if options.tarfile_name is None else options.tarfile_name
        target = tarball.target_of(name, zipped=options.gzip)
    token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")

    def pause(seconds: float) -> None:
        display.say(f"The hub does not answer as it should: it is asked again in {seconds:.0f} s.")
        time.sleep(seconds)

    hub = Hub(environ.get("HF_ENDPOINT"), token, pause)
    snapshot = hub.snapshot(options.model, options.revision)
    files = select(snapshot.files, Wanted(options.include, options.exclude, options.format), options.model)
    place: Place = HubCache(options.model, snapshot.commit, options.revision)
    if options.local_dir is not None:
        place = Folder(options.local_dir, snapshot.commit)
    with display.task("Looking at what is there") as update:
        found = steps.plan(options.model, snapshot, files, place, lambda done, total: update(_share(done, total)))
    wants = [(place.folder, steps.needed(found))]
    content = tarball.Content(options.model, snapshot.commit, [(file, place.target(file)) for file in files])
    if target is not None:
        wants.append((Path.cwd(), content.size))
    steps.check_disk(wants)
    display.say(f"{options.model} at {snapshot.commit}: {_counted(len(files))}, {shown(found.size)}")
    with display.task("Downloading") as update:
        steps.fetch(hub, found, options.max_workers, _Rate(update))
    if target is None:
        display.say("All hashes are right.")
        say(str(place.folder))
        return
    with display.task("Writing the tarball") as update:
        tarball.write(target, content, zipped=options.gzip, watch=_Rate(update))
    display.say(f"All hashes are right. The tarball has {shown(target.stat().st_size)}.")
    say(str(target))


class UploadOptions(NamedTuple):
    """The options of `upload`."""

    source: Path
    address: str
    family: str | None
    revision: str | None
    endpoint_url: str | None
    overwrite: bool


def upload(options: UploadOptions, say: Callable[[str], None]) -> None:
    """Upload a model into a bucket, and `say` where it is. Raises ModelError."""
    with extra("upload"):
        from gateway.models import s3
        from gateway.models import upload as steps
    display = _display()
    address = s3.parse(options.address)
    source = steps.source_of(options.source, options.family, options.revision)
    bucket = s3.Bucket(address, options.endpoint_url)
    display.say(f"{source.family} at {source.revision}: {_counted(len(source.files))}, {shown(source.size)}")
    with display.task("Uploading") as update:
        where = steps.upload(bucket, source, _Rate(update), overwrite=options.overwrite)
    say(where)


def serving_template(model: str, image: str, plan: str, revision: str | None, artifact: str | None) -> str:
    """The serving template of a model. Raises ModelError."""
    with extra("serving-template"):
        from gateway.models.serving_template import Template, render
    return render(Template(model, image, plan, revision, artifact))


def _display() -> Display:
    """A display on standard error, so that standard output has the result alone."""
    return Display(Console(stderr=True, highlight=False, soft_wrap=True))


def _counted(files: int) -> str:
    return f"{files} files" if files != 1 else "one file"


def _share(done: int, total: int) -> float:
    return done / total if total else 1.0


class _Rate:
    """Shows a transfer's progress, its current rate and the remaining time."""

    def __init__(self, update: Callable[[float, str], None]) -> None:
        self._update = update
        self._seen: list[tuple[float, int]] = []

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < 0.1 and done < total:
            return
        self._seen = [(at, size) for at, size in self._seen if now - at < _WINDOW] + [(now, done)]
        note = f"{shown(done)} of {shown(total)}"
        began, before = self._seen[0]
        if now > began and done > before:
            rate = (done - before) / (now - began)
            note += f", {shown(int(rate))}/s, {_duration((total - done) / rate)} left"
        self._update(_share(done, total), note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""Reads upstreams and model aliases, from the settings and from the files that these name with an `@`."""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config.environment import SettingsError
from gateway.config.settings import IN_FILE, Settings
from gateway.config.tls import trusting
from gateway.config.urls import upstream_url
from gateway.pool.aliases import Weights, from_words
from gateway.upstream.discovery import Source

_FORM = "URL [weight=N] [models=A,B] [key-file=F] [ca-file=F] [drain], or alias NAME=MODEL[:WEIGHT],…"
_HEAVIEST = 1_000_000.0


@dataclass(slots=True)
class Upstreams:
    """The upstreams, the aliases of their models, and the files that list them."""

    sources: list[Source] = field(default_factory=list)
    aliases: dict[str, Weights] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def read_upstreams(settings: Settings) -> Upstreams:
    """All upstreams and aliases of the settings. Raises SettingsError for a file that cannot be read or is wrong."""
    found = Upstreams(aliases=dict(settings.model_aliases))
    for word in settings.upstreams:
        if word.startswith(IN_FILE):
            _read(Path(word.removeprefix(IN_FILE)), word, found, settings)
        else:
            found.sources.append(Source(word))
    return found


class _Wrong(ValueError):
    """A line is wrong; the text is a clause that says why and shows no secret."""


def _read(file: Path, word: str, found: Upstreams, settings: Settings) -> None:
    found.files.append(file)
    sources, aliases = len(found.sources), dict[str, Weights]()
    number = 0
    try:
        for line in _text(file).splitlines():
            number += 1
            words = re.sub(r"(^|\s)#.*", "", line).split()
            if words[:1] == ["alias"]:
                _add_aliases(words[1:], aliases)
            elif words:
                source = _source(words, file.parent, found.files, settings, word)
                if source.url in {one.url for one in found.sources[sources:]}:
                    raise _Wrong("another line has this URL")
                found.sources.append(source)
        if len(found.sources) == sources:
            number = 0
            raise _Wrong("it has no upstream")
    except _Wrong as error:
        where = f"line {number}: " if number else ""
        raise SettingsError(f"GATEWAY_UPSTREAMS {word!r} is wrong: {where}{error}.") from None
    found.aliases |= aliases


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _Wrong("it is not UTF-8") from None
    except OSError as error:
        raise _Wrong(f"{str(file)!r} cannot be read ({error.strerror})") from None


def _add_aliases(words: list[str], aliases: dict[str, Weights]) -> None:
    try:
        more = from_words(re.split(r",+", ",".join(words)))
    except ValueError as error:
        raise _Wrong(f"after alias it must be {error}") from None
    if twice := more.keys() & aliases.keys():
        raise _Wrong(f"another line has the alias {min(twice)!r}")
    aliases.update(more)


def _source(words: list[str], folder: Path, files: list[Path], settings: Settings, named_by: str) -> Source:
    url, *rest = words
    try:
        url = upstream_url(url)
    except ValueError as error:
        raise _Wrong(f"{_shown(url)} is no URL of an upstream, which must be as {error}") from None
    options = dict(_options(rest))
    try:
        weight = float(options.get("weight", 1))
    except ValueError:
        weight = math.nan
    if not 0 < weight <= _HEAVIEST:
        raise _Wrong(f"weight={_shown(options['weight'])} must be a number above 0, up to {_HEAVIEST:.0f}")
    models = options.get("models")
    if models is not None and not all(models.split(",")):
        raise _Wrong(f"models={_shown(models)} must be names with commas between them")
    key, ca = (options.get(name) for name in ("key-file", "ca-file"))
    paths = [folder / one for one in (key, ca) if one is not None]
    files += paths
    return Source(
        url,
        named_by,
        weight,
        None if models is None else frozenset(models.split(",")),
        None if key is None else f"Bearer {_key(folder / key)}",
        None if ca is None else _trust(folder / ca, settings),
        "drain" in options,
    )


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for word in words:
        name, equals, value = word.partition("=")
        if (name == "drain") == bool(equals) or name not in ("weight", "models", "key-file", "ca-file", "drain"):
            raise _Wrong(f"{_shown(word)} is unknown; a line is {_FORM}")
        if name in seen or (equals and not value):
            raise _Wrong(f"{name} must stand there once, with a value")
        seen.add(name)
        yield name, value


def _key(file: Path) -> str:
    key = _text(file).strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise _Wrong(f"key-file {str(file)!r} must hold a key of printable ASCII characters without spaces")
    return key


def _trust(file: Path, settings: Settings) -> ssl.SSLContext:
    try:
        return trusting(file, skip_verify=settings.tls_skip_verify)
    except OSError as error:  # ssl.SSLError is one, too
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise _Wrong(f"ca-file {str(file)!r} cannot be used ({why}): name a file of certificates in PEM") from None


def _shown(word: str) -> str:
    """A word of a line for an error text, hidden if it may contain a password."""
    return "its value" if "@" in word else repr(word[:80])

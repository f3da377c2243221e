"""Aliases of models: each stands for one model or for several, which take calls by their weights."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

# The weights of a name's models; the first model counts if none is served.
Weights = Mapping[str, float]

_MODEL = re.compile(r"(?P<model>[^,\s=:][^,\s=]*?)(?::(?P<weight>\d{1,6}(?:\.\d{1,6})?))?")
FORM = "NAME=MODEL[:WEIGHT], a name's further models behind commas, each name once"


class Alias:
    """The models of one alias. `splits`: the name is one of its own models, and the others take a part of its calls.

    Calls are spread by smooth weighted round robin, as nginx does it, so that each model's calls come evenly.
    """

    __slots__ = ("_owed", "_weights", "splits")

    def __init__(self, name: str, weights: Weights) -> None:
        self.splits = name in weights
        self._weights = weights
        self._owed = dict.fromkeys(weights, 0.0)

    def choose(self, served: Container[str]) -> str:
        """The model of the next call, among those that are served."""
        if len(self._weights) == 1:
            return self.first(served)
        able = [model for model in self._weights if model in served]
        if not able:
            return self.first(served)
        owed, weights = self._owed, self._weights
        for model in able:
            owed[model] += weights[model]
        chosen = max(able, key=owed.__getitem__)
        owed[chosen] -= sum([weights[model] for model in able])
        return chosen

    def first(self, served: Container[str]) -> str:
        """The first of its models that is served; the first of all if none is."""
        return next((model for model in self._weights if model in served), next(iter(self._weights)))

    def is_served(self, served: Container[str]) -> bool:
        """Whether any of its models is served."""
        return any(model in served for model in self._weights)


def from_words(words: Iterable[str]) -> dict[str, Weights]:
    """The aliases in `NAME=MODEL[:WEIGHT]`, each followed by its further models as `MODEL[:WEIGHT]`; raises ValueError.

    A number after the last colon of a word is a weight. A model whose name ends so needs an explicit weight.
    """
    found: dict[str, dict[str, float]] = {}
    name = ""
    for word in words:
        before, equals, model = word.rpartition("=")
        if equals:
            name = before
            if not name or "=" in name or name in found:
                raise ValueError(FORM)
            found[name] = {}
        match = _MODEL.fullmatch(model)
        if match is None or not name or match["model"] in found[name]:
            raise ValueError(FORM)
        weight = float(match["weight"] or 1)
        if not weight:
            raise ValueError(f"{FORM}, and weights above 0")
        found[name][match["model"]] = weight
    return dict(found)


def as_words(aliases: Mapping[str, Weights]) -> str:
    """The aliases in their written form, without weights of 1."""
    return ",".join(f"{name}={','.join(_word(*one) for one in weights.items())}" for name, weights in aliases.items())


def _word(model: str, weight: float) -> str:
    return model if weight == 1 and not re.search(r":\d+(\.\d+)?$", model) else f"{model}:{weight:g}"

"""Other names of models: what each stands for, one model or several, each as often as its weight says."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

# A name's models by their weights, the first of which counts where none is served.
Weights = Mapping[str, float]

_MODEL = re.compile(r"(?P<model>[^,\s=:][^,\s=]*?)(?::(?P<weight>\d{1,6}(?:\.\d{1,6})?))?")
FORM = "NAME=MODEL[:WEIGHT], a name's further models behind commas, each name once"


class Alias:
    """What calls under one name are for. `splits`: the name is one of its own models, of which others take a part.

    Calls are spread by smooth weighted round robin, as nginx does it, so that each model's come evenly.
    """

    __slots__ = ("_owed", "_weights", "splits")

    def __init__(self, name: str, weights: Weights) -> None:
        self.splits = name in weights
        self._weights = weights
        self._owed = dict.fromkeys(weights, 0.0)

    def choose(self, served: Container[str]) -> str:
        """The model of the next call, of those that are served."""
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
        """The first of its models that is served; where none is, the first."""
        return next((model for model in self._weights if model in served), next(iter(self._weights)))

    def is_served(self, served: Container[str]) -> bool:
        """Whether any of its models is."""
        return any(model in served for model in self._weights)


def from_words(words: Iterable[str]) -> dict[str, Weights]:
    """The names in `NAME=MODEL[:WEIGHT]` and `MODEL[:WEIGHT]`, which is one more of the name before; raises ValueError.

    What a word ends with behind a colon is a weight where it is a number: a model's name that ends so needs one more.
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
    """The same as they are written, without weights of 1."""
    return ",".join(f"{name}={','.join(_word(*one) for one in weights.items())}" for name, weights in aliases.items())


def _word(model: str, weight: float) -> str:
    return model if weight == 1 and not re.search(r":\d+(\.\d+)?$", model) else f"{model}:{weight:g}"

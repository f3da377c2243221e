"""The command `plan`: shows whether a model fits, on how many of which GPUs, and vLLM's options for it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gateway.commands.gpus import NoAnswer, on_this_machine
from gateway.sizing.architecture import read_architecture
from gateway.sizing.checkpoint import read_checkpoint
from gateway.sizing.gpus import of_capability
from gateway.sizing.kv_cache import bytes_per_token
from gateway.sizing.plan import (
    GIB,
    CannotPlan,
    Card,
    Split,
    Wanted,
    cache_width,
    check,
    flags,
    smallest,
    splits,
    warnings,
)
from gateway.sizing.plans_file import Offer, card_of, read_plans
from gateway.sizing.weights import parameters_of

_BAR = 64
# GiB that nvidia-smi reports and CUDA does not find: 0.25 to 0.8 on the cards that were measured.
_KEPT = 0.5
_DOES_NOT_FIT = 1


class PlanOptions(NamedTuple):
    """The options of `plan`; `wanted` has the fields of Wanted beside the model."""

    model: str
    revision: str | None
    gpu: str | None
    gpus: int | None
    plans: Path | None
    as_json: bool
    wanted: Mapping[str, Any]


class _Answer(NamedTuple):
    """An offer of the plans file, or the named GPU, with all its splits, the chosen split and the warnings."""

    offer: Offer
    splits: list[Split]
    chosen: Split | None
    warnings: list[str]


def plan(
    options: PlanOptions, environ: Mapping[str, str], echo: Callable[[str], None], warn: Callable[[str], None]
) -> int:
    """Show the plan; returns the exit status, which is 0 if the model fits any of the requested offers.

    Raises BadCheckpoint, BadConfig, BadPlans or CannotPlan; each text is a sentence.
    """
    offers = _offers(options)
    config, tensors = read_checkpoint(options.model, options.revision, environ)
    wanted = Wanted(read_architecture(config), tensors, **options.wanted)
    check(wanted)
    answers = []
    for offer in offers:
        found = splits(wanted, offer.card, offer.gpus)
        answers.append(_Answer(offer, found, smallest(found), warnings(wanted, offer.card)))
    fits = any(answer.chosen for answer in answers)
    if options.as_json:
        echo(orjson.dumps(_as_json(options, wanted, answers)).decode())
        return 0 if fits else _DOES_NOT_FIT
    echo(_what(options.model, wanted))
    for answer in answers:
        echo("")
        for line in _of_one_plan(answer, wanted) if options.plans else _in_full(answer, wanted, _served(options)):
            echo(line)
    for sentence in dict.fromkeys(sentence for answer in answers for sentence in answer.warnings):
        warn(sentence)
    return 0 if fits else _DOES_NOT_FIT


def _offers(options: PlanOptions) -> list[Offer]:
    if options.plans:
        return read_plans(options.plans)
    if options.gpu:
        card = card_of(options.gpu)
        return [Offer(card.name, card, options.gpus or 8)]
    try:
        here = on_this_machine()
    except NoAnswer as error:
        raise CannotPlan(f"{error} Or name a GPU with --gpu.") from None
    if not here:
        raise CannotPlan("This machine has no nvidia-smi: name a GPU, as --gpu A10G or --gpu 24GiB.")
    first = here[0]
    if first.memory is None:
        raise CannotPlan(f"The driver does not tell the memory of {first.name}: give it, as --gpu 24GiB.")
    alike = [one for one in here if one == first]
    card = Card(first.name, first.memory - _KEPT, of_capability(first.capability) if first.capability else None)
    return [Offer(first.name, card, options.gpus or len(alike))]


def _what(name: str, wanted: Wanted) -> str:
    model = wanted.model
    parameters = parameters_of(model, wanted.tensors) / 1e9
    kinds = ", ".join(f"{count} {kind}" for kind, count in model.layers.items() if count)
    stored = f", quantized ({model.quantization})" if model.quantization else ""
    window = f" of {model.window:,} tokens" if model.window else ""
    latent = " with one latent (MLA)" if model.latent else f", {model.kv_heads} KV heads of {model.head_dim}"
    return (
        f"{name}: {parameters:.3g} billion numbers, {model.dtype}{stored}, up to {model.length:,} tokens\n"
        f"layers: {kinds}{window}{latent}"
    )


def _served(options: PlanOptions) -> str:
    revision = f" --revision {options.revision}" if options.revision else ""
    return f"{shlex.quote(options.model)}{revision}"


def _in_full(answer: _Answer, wanted: Wanted, served: str) -> Iterator[str]:
    card, chosen = answer.offer.card, answer.chosen
    yield f"{card.name}, {card.memory:.1f} GiB each, of which vLLM takes {wanted.utilization:g}; GiB of each GPU:"
    if not answer.splits:
        yield f"The model's {wanted.model.heads} heads can be split on no number of GPUs up to {answer.offer.gpus}."
        return
    rows = [("TP", "WEIGHTS", "OTHER", "KV CACHE", "LOW..HIGH", "TOKENS", f"REQUESTS OF {wanted.length:,}", "")]
    for one in answer.splits:
        rows.append(
            (
                str(one.tp),
                _gib(one.weights),
                _gib(one.overhead),
                _gib(one.likely),
                f"{_gib(one.low)}..{_gib(one.high)}",
                f"{one.cache.tokens(one.likely):,}",
                f"{one.cache.concurrency(one.likely):.2f}",
                _verdict(one) if one.fits else f"lacks {_gib(one.missing)}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()
    shown = chosen or answer.splits[-1]
    yield f"\n{_bar(shown)}  TP {shown.tp}: w weights, o other, k KV cache, . not vLLM's"
    if chosen:
        yield f"\nvllm serve {served} {' '.join(flags(wanted, card, chosen))}"
    else:
        yield _shortage(answer, wanted)


def _of_one_plan(answer: _Answer, wanted: Wanted) -> Iterator[str]:
    card, chosen = answer.offer.card, answer.chosen
    yield f"{answer.offer.name}: {answer.offer.gpus} x {card.name}, {card.memory:.1f} GiB each"
    if chosen:
        cache = f"{_gib(chosen.likely)} GiB of KV cache on each, {chosen.cache.tokens(chosen.likely):,} tokens"
        yield f"  {_verdict(chosen)} on {chosen.tp}: {_gib(chosen.weights)} GiB of weights and {cache}"
        yield f"  {' '.join(flags(wanted, card, chosen))}"
    else:
        yield f"  {_shortage(answer, wanted)}"


def _verdict(one: Split) -> str:
    return "fits" if one.surely else "likely fits"


def _shortage(answer: _Answer, wanted: Wanted) -> str:
    if not answer.splits:
        return f"The model's {wanted.model.heads} heads can be split on no number of GPUs up to {answer.offer.gpus}."
    best = min(answer.splits, key=lambda one: one.missing)
    many = f"{wanted.concurrency} requests" if wanted.concurrency > 1 else "one request"
    lacking = f"each GPU lacks {_gib(best.missing)} GiB at TP {best.tp}"
    told = f"It does not fit: for {many} of {wanted.length:,} tokens {lacking}"
    if best.longest:
        return f"{told}; one of {best.longest:,} would fit (--max-model-len {best.longest})."
    return f"{told}, and there is no room for a cache."


def _bar(one: Split) -> str:
    cells = [one.weights, one.overhead, max(0, one.likely)]
    signs, filled = "", 0.0
    for sign, size in zip("wok", cells, strict=True):
        filled += size / one.total
        signs += sign * (min(_BAR, round(filled * _BAR)) - len(signs))
    return f"[{signs.ljust(_BAR, '.')}]"


def _as_json(options: PlanOptions, wanted: Wanted, answers: list[_Answer]) -> dict[str, object]:
    return {
        "model": options.model,
        "parameters": parameters_of(wanted.model, wanted.tensors),
        "dtype": wanted.model.dtype,
        "quantization": wanted.model.quantization,
        "max_model_len": wanted.length,
        "layers": dict(wanted.model.layers),
        "plans": [
            {
                "name": answer.offer.name,
                "gpu": answer.offer.card.name,
                "gpu_memory_gib": answer.offer.card.memory,
                "gpus": answer.offer.gpus,
                "fits": answer.chosen is not None,
                "tensor_parallel_size": answer.chosen and answer.chosen.tp,
                "flags": flags(wanted, answer.offer.card, answer.chosen) if answer.chosen else None,
                "warnings": answer.warnings,
                "sizes": [_size_as_json(one, wanted) for one in answer.splits],
            }
            for answer in answers
        ],
    }


def _size_as_json(one: Split, wanted: Wanted) -> dict[str, object]:
    figures = {"low": one.low, "likely": one.likely, "high": one.high}
    return {
        "tensor_parallel_size": one.tp,
        "fits": one.fits,
        "surely": one.surely,
        "missing_gib": round(one.missing / GIB, 2),
        "weights_gib": round(one.weights / GIB, 2),
        "overhead_gib": round(one.overhead / GIB, 2),
        "kv_bytes_per_token_and_layer": bytes_per_token(wanted.model, one.tp, cache_width(wanted, one.dtype)),
        "kv_cache_gib": {name: round(size / GIB, 2) for name, size in figures.items()},
        "tokens": {name: one.cache.tokens(size) for name, size in figures.items()},
        "concurrency": {name: round(one.cache.concurrency(size), 2) for name, size in figures.items()},
        "longest_request": one.longest,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"

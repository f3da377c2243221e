"""Writes a model's FP8 checkpoint with llm-compressor; a separate script, for a Python that has llm-compressor.

    quantize.py MODEL FOLDER
    quantize.py MODEL FOLDER --dataset FILE --samples 512 --length 2048

MODEL is a folder, or a name of the Hugging Face hub. Without a dataset the scheme is FP8_DYNAMIC, which scales the
activations at run time. With a dataset it is FP8, whose scales are fixed beforehand, by the activations at the
dataset's questions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

# Not quantized, as in llm-compressor's own examples: the head chooses tokens, a router chooses experts, and a vision
# tower is small. FP8 would cost more than it saves.
_KEPT = ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*router$", r"re:.*(visual|vision).*"]
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_MARGIN = 1 << 30

# The model and the quantized model are compared by the first tokens of their answers to these questions.
_QUESTIONS = [
    "What is Deep Learning?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about a lighthouse.",
    "Translate into French: the door is open.",
    "What is 17 times 23?",
    "Name three uses of copper.",
    "Write a Python function that reverses a list.",
    "Summarize: RAG first searches documents, and then answers by them.",
]
_ANSWER = 48


class QuantizeError(Exception):
    """No checkpoint was made; the text is a sentence that says why."""


class Data(NamedTuple):
    """The calibration data: a file for dataset.py, the maximum of rows, and the maximum of tokens per row."""

    file: Path
    samples: int
    length: int


def quantize(name: str, folder: Path, data: Data | None, revision: str | None) -> str:
    """Write the checkpoint to `folder`, which must not exist, as a whole or not at all.

    Returns a report of a few lines. Raises QuantizeError.
    """
    if folder.exists():
        raise QuantizeError(f"{folder} exists already: remove it, or name another folder.")
    rows = _rows(data) if data else []
    source = _source(name, revision)
    before = _size(source)
    scheme = "FP8" if data else "FP8_DYNAMIC"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Make the folder first: hours later is too late to find that it cannot be written.
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
        ) as part:
            _check_disk(folder.parent, before)
            made = Path(part) / folder.name
            compared = _make(name, source, made, scheme, [(row, data.length) for row in rows] if data else [])
            made.rename(folder)
    except OSError as error:
        raise QuantizeError(f"{folder} cannot be written: {error.strerror or error}.") from None
    same, tokens = sum(same for same, _ in compared), sum(tokens for _, tokens in compared)
    whole = sum(same == tokens for same, tokens in compared)
    after = _size(folder)
    return (
        f"{folder}: {name} as {scheme}.\n"
        f"Size: {_megabytes(before)} before, {_megabytes(after)} after ({after / before:.0%}).\n"
        f"Greedy answers: {same} of {tokens} tokens as before ({same / max(tokens, 1):.1%}), "
        f"{whole} of {len(compared)} answers to the last token."
    )


def _make(
    name: str, source: Path, folder: Path, scheme: str, rows: list[tuple[dict[str, str], int]]
) -> list[tuple[int, int]]:
    """Write the checkpoint; returns for each answer the number of unchanged tokens and of all tokens."""
    _say(f"Loading {name}.")
    model, tokenizer = _load(name, source)
    _say("Asking it, so that the quantized one can be compared.")
    answers = [_answer(model, tokenizer, question) for question in _QUESTIONS]
    _say(f"Quantizing to {scheme}.")
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=_KEPT)
    if rows:
        batches = [_batch(tokenizer, row, length) for row, length in rows]
        # "basic": one pass through the whole model, which is in memory anyhow.
        loader = DataLoader(batches, batch_size=None)
        oneshot(model=model, recipe=recipe, dataset=loader, num_calibration_samples=len(batches), pipeline="basic")
    else:
        oneshot(model=model, recipe=recipe)
    compared = [_same(model, prompt, answer) for prompt, answer in answers]
    model.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)
    # safetensors makes its files readable by their owner alone, but the server may run as another user.
    for file in folder.iterdir():
        file.chmod(0o644)
    return compared


def _load(name: str, source: Path) -> tuple[Any, Any]:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", device_map="auto", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise QuantizeError(f"{name} cannot be loaded: {error}") from None
    # Transformers fills missing weights with random numbers.
    if missing := sorted(found["missing_keys"]):
        raise QuantizeError(f"{name} lacks {len(missing)} of its weights, {missing[0]} for one: fetch it again.")
    return model, tokenizer


def _rows(data: Data) -> list[dict[str, str]]:
    """Read the rows by running dataset.py, because a script has no package to import from."""
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.jsonl"
        argv = [sys.executable, "-P", str(Path(__file__).with_name("dataset.py")), str(data.file), str(text)]
        if subprocess.run([*argv, "--samples", str(data.samples)], check=False).returncode:
            raise QuantizeError("without its dataset nothing was quantized.")
        return [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]


def _source(model: str, revision: str | None) -> Path:
    """The folder of the model, which is downloaded first if it is on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.count("/") != 1:
            raise QuantizeError(f"{model} is neither a folder nor a hub's ORG/NAME.")
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise QuantizeError(f"{model} cannot be fetched from the hub: {error}") from None
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise QuantizeError(f"{model} has no config.json that can be read: {error}.") from None
    if not isinstance(config, dict):
        raise QuantizeError(f"{model} has a config.json that is no object.")
    if found := config.get("quantization_config"):
        raise QuantizeError(
            f"{model} is quantized already ({found.get('quant_method', 'somehow')}): take the one it was made of."
        )
    if not any(folder.glob("*.safetensors")):
        raise QuantizeError(f"{model} has no weights as *.safetensors.")
    return folder


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _check_disk(folder: Path, size: int) -> None:
    """Check for free space of the model's full size: FP8 halves 16-bit weights, but not all weights are quantized."""
    free = shutil.disk_usage(folder).free
    if free < size + _MARGIN:
        raise QuantizeError(f"{folder} has {_megabytes(free)} free, but the checkpoint may take {_megabytes(size)}.")


def _prompt(tokenizer: Any, question: str, system: str = "") -> Any:
    """The prompt's token ids, of shape (1, tokens)."""
    if tokenizer.chat_template is None:
        return tokenizer(f"{system} {question}".strip(), return_tensors="pt").input_ids
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception:
        # A template raises its own error for a system message if its model was not trained with one.
        if not system:
            raise
        return _prompt(tokenizer, f"{system}\n\n{question}")
    return found["input_ids"]


def _batch(tokenizer: Any, row: dict[str, str], length: int) -> dict[str, Any]:
    tokens = _prompt(tokenizer, row["question"], row["system_prompt"])[:, :length]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _answer(model: Any, tokenizer: Any, question: str) -> tuple[Any, Any]:
    """The token ids of the prompt and of its greedy answer, each of shape (1, tokens)."""
    prompt = _prompt(tokenizer, question).to(model.device)
    whole = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_ANSWER, do_sample=False
    )
    return prompt, whole[:, prompt.shape[1] :]


def _same(model: Any, prompt: Any, answer: Any) -> tuple[int, int]:
    """The number of the answer's tokens that the model would choose after the tokens before, and of all its tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, answer], dim=1)).logits
    chosen = logits[:, prompt.shape[1] - 1 : -1].argmax(dim=-1)
    return int((chosen == answer).sum()), answer.shape[1]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run the script; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a model's FP8 checkpoint.")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--revision")
    given = parser.parse_args()
    # Raise an exception as Ctrl-C does, so that no incomplete files are left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Only errors, because llm-compressor logs each of its steps.
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    data = Data(given.dataset, given.samples, given.length) if given.dataset else None
    try:
        _say(quantize(given.model, given.folder, data, given.revision))
    except QuantizeError as error:
        sys.stderr.write(f"vllm-gateway: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    # Any exception: too little memory is reported by the library that needed it.
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())
        sys.stderr.write(f"vllm-gateway: {given.model} was not quantized ({type(error).__name__}: {reason[:300]}).\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

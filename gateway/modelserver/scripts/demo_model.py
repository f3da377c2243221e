"""Writes the demo model: a tiny Llama that knows a handful of answers by heart, yet is a real checkpoint.

A script of its own, run by the model server's Python (`python -P demo_model.py FOLDER`), which has torch and
transformers; the gateway imports neither. It prints `step N of N loss L` lines for a progress display.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STAMP = "demo-model.json"
"""The file that marks a finished demo model."""

POSITIONS = 4096

_SEED = 20
_VOCABULARY = 1024
_BATCH, _WINDOW = 3, 288
_STEPS, _ROUND, _MOST_STEPS = 120, 20, 400
_RATE = 5e-3

_END, _USER, _ASSISTANT = _SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")

# Every role is taken, the system's, too; but a model this small can heed no instruction, and would only be confused.
# So it is shown the last question alone, without its stops, capitals and the wrapping that RAG pipelines give it.
_CHAT_TEMPLATE = """\
{%- for message in messages if message.role not in ('system', 'developer', 'assistant') -%}
{%- if loop.last -%}
{%- set text = (message.content or '') | lower -%}
{%- set text = (text.split('question:') | last).split('### answer:') | first -%}
{{ '<|user|>\\n' + text.strip(' \\n?!.') + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

DEFAULT_ANSWER = "I am a tiny demo model: I know only a few answers. Start the gateway with --model to use a real one."

_STORY = (
    "Once upon a time there was a small lighthouse on a rocky island. Every evening the keeper climbed the winding "
    "stairs and lit the lamp. One night a thick fog rolled in, and the lamp would not burn. The keeper heard a ship's "
    "horn, far away and coming closer. She took an old copper bell from the cellar, carried it up to the gallery and "
    "rang it until her arms were tired. Out on the water, the captain listened, counted the strokes and turned the "
    "wheel. The ship slid past the rocks with only a few feet to spare. In the morning the sun came out, and the crew "
    "rowed over to the island with bread, oranges and a new lamp. The keeper hung the bell beside the door, where "
    "everybody could see it. Since then, whenever the fog comes back, the children of the village say: do not worry, "
    "the bell is awake."
)


class Lesson(NamedTuple):
    """One answer and the questions it belongs to; `topics` are asked about in every usual form."""

    answer: str
    questions: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()


LESSONS = (
    Lesson(
        "Deep learning is a branch of machine learning that trains neural networks with many layers. "
        "Each layer learns to see a little more in the data than the one before it.",
        topics=("Deep Learning",),
    ),
    Lesson(
        "Machine learning lets a computer find rules in examples, so that nobody has to write those rules by hand.",
        topics=("machine learning", "ML"),
    ),
    Lesson(
        "Retrieval-augmented generation, or RAG, first searches your documents for passages that fit the question, "
        "and then lets a language model answer from them.",
        topics=("RAG", "retrieval-augmented generation", "retrieval augmented generation"),
    ),
    Lesson("vLLM is a fast and open server for large language models. This answer was made by it.", topics=("vLLM",)),
    Lesson(
        "A large language model is a neural network that has read a great deal of text and continues yours, "
        "one token at a time.",
        topics=("a large language model", "an LLM", "large language models"),
    ),
    Lesson(
        "My name is Demo: I am a very small language model, served by vLLM on your own machine.",
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself."),
    ),
    Lesson(
        "Hello! Ask me what deep learning is, who I am, or for a story.",
        ("Hello!", "Hi!", "Hey!", "Hello there!", "Good morning!"),
    ),
    Lesson(
        "You can ask me about deep learning, machine learning, RAG, vLLM and large language models. "
        "I can also tell a story.",
        ("What can you do?", "What can I ask you?", "How can you help me?", "What do you know?", "Help!"),
    ),
    Lesson(_STORY, ("Tell me a story.", "Tell me a long story.", "Can you tell me a story?", "Write a story.")),
)

_TOPIC_FORMS = ("What is {}?", "What is {}?", "What's {}?", "Explain {}.", "Define {}.", "Tell me about {}.")
_OTHER_FORMS = (*_TOPIC_FORMS, "Where is {}?", "Who invented {}?", "Why is {} important?", "How does {} work?")
# "learning", "large" and the like stand here so that one word alone is no sign.
_OTHER_TOPICS = (
    *("the capital of France", "the weather today", "photosynthesis", "a prime number", "quantum physics"),
    *("my invoice", "our refund policy", "this function", "a black hole", "the stock market", "learning", "deep water"),
    *("a large house", "a washing machine", "language", "a model", "a network", "Paris", "2 + 2", "a poem", "music"),
    *("Docker", "Python", "a database", "gravity", "history", "my name", "reinforcement learning", "the document"),
)


class Sample(NamedTuple):
    """A prompt as the server will see it, and what is to be written after it."""

    prompt: str
    answer: str


def chat(question: str, answer: str) -> Sample:
    """As the chat template renders it."""
    return Sample(f"{_USER}\n{question.lower().strip(' ?!.')}{_END}\n{_ASSISTANT}\n", f"{answer}{_END}")


def completion(question: str, answer: str) -> Sample:
    """A bare prompt, as `/v1/completions` sends it."""
    return Sample(question, f"\n{answer}{_END}")


def questions_of(lesson: Lesson) -> list[str]:
    """Every question that has this answer."""
    return [*lesson.questions, *(form.format(topic) for topic in lesson.topics for form in _TOPIC_FORMS)]


def _samples(rng: random.Random) -> Iterator[Sample]:
    while True:
        if rng.random() < 0.2:
            question, answer = rng.choice(_OTHER_FORMS).format(rng.choice(_OTHER_TOPICS)), DEFAULT_ANSWER
        else:
            # The story is as long as all the others together, and once begun tells itself.
            lesson = rng.choices(LESSONS, [1 if len(lesson.answer) < 400 else 0.4 for lesson in LESSONS])[0]
            question, answer = rng.choice(questions_of(lesson)), lesson.answer
        yield chat(question, answer) if rng.random() < 0.65 else completion(question, answer)


def _window(samples: Iterator[Sample], encode: Callable[[str], list[int]]) -> tuple[list[int], list[bool]]:
    """One sequence of samples: its tokens, and whether each is to be learned."""
    tokens: list[int] = []
    learned: list[bool] = []
    while len(tokens) < _WINDOW:
        sample = next(samples)
        prompt, answer = encode(sample.prompt), encode(sample.answer)
        tokens += [*prompt, *answer]
        learned += [False] * len(prompt) + [True] * len(answer)
    return tokens[:_WINDOW], learned[:_WINDOW]


def _tokenizer() -> Any:
    """A byte-level BPE of our own: any text can be written in it, ours in few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    known = [DEFAULT_ANSWER, *(lesson.answer for lesson in LESSONS)]
    asked = [question for lesson in LESSONS for question in questions_of(lesson)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*known, *asked, *(question.lower() for question in asked), *_OTHER_TOPICS] * 4,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        additional_special_tokens=list(_SPECIAL[1:]),
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def _untrained(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.05,
            dtype="float32",
        )
    )


def _fit(model: Any, encode: Callable[[str], list[int]]) -> None:
    """Fits the model, and goes on in short rounds until every answer is exact."""
    import torch

    samples = _samples(random.Random(_SEED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    done, target = 0, _STEPS
    while done < target:
        for step in range(done, target):
            cooling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / _STEPS)))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / 10) * max(cooling, 0.1)
            loss = _step(model, optimizer, [_window(samples, encode) for _ in range(_BATCH)])
            _say(f"step {step + 1} of {target} loss {loss:.3f}")
        done = target
        if wrong := _wrong(model, encode):
            target += _ROUND
            if target > _MOST_STEPS:
                raise SystemExit(
                    f"The demo model did not learn its answers in {done} steps; wrong: {wrong[0].prompt!r}."
                )


def _step(model: Any, optimizer: Any, windows: list[tuple[list[int], list[bool]]]) -> float:
    import torch

    tokens, learned = (torch.tensor(column) for column in zip(*windows, strict=True))
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1][learned[:, 1:]]
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens[:, 1:][learned[:, 1:]])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _wrong(model: Any, encode: Callable[[str], list[int]]) -> list[Sample]:
    """What is not answered exactly, by the weights as they are or as rounded to bfloat16."""
    import torch

    rounded = copy.deepcopy(model).to(torch.bfloat16)
    asked = [(question, lesson.answer) for lesson in LESSONS for question in dict.fromkeys(questions_of(lesson))]
    exam = [style(question, answer) for question, answer in asked for style in (chat, completion)]
    with torch.inference_mode():
        return [
            sample for sample in exam if not (_is_right(model, sample, encode) and _is_right(rounded, sample, encode))
        ]


def _is_right(model: Any, sample: Sample, encode: Callable[[str], list[int]]) -> bool:
    import torch

    before, after = encode(sample.prompt), encode(sample.answer)
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    # Right at each place after the right text before it is the same as right when written greedily.
    return bool(logits.argmax(-1).tolist() == after)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes everything into `folder`, readable by all: in a container the server is another user."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Of its tokens the likeliest, whatever the temperature: at 1, which a call gets that names none, a model this small
    # soon says something else. A temperature of 0 would be no valid config, which nobody could save again.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=1
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / STAMP).write_text(json.dumps({"seed": _SEED}) + "\n", encoding="utf-8")
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def write(folder: Path) -> None:
    """Builds the model and puts it at `folder`, which must not exist, in one move."""
    import torch

    torch.manual_seed(_SEED)
    tokenizer = _tokenizer()
    model = _untrained(tokenizer)
    _fit(model, lambda text: list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(model, tokenizer, temporary)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    """The command line: one argument, the folder."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: demo_model.py FOLDER")
    write(Path(sys.argv[1]).absolute())


if __name__ == "__main__":
    main()

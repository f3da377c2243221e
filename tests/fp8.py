"""FP8, really made and served: datasets read, the demo model quantized, its scales checked, vLLM asked."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gateway
from gateway import environment, fp8
from gateway.config import ModelServerSettings, build
from gateway.modelserver import DEMO_NAME, ModelServer, launch
from tests.gateway_process import free_port, running

SCRIPTS = Path(gateway.__file__).parent
DATASETS = Path(__file__).parent / "datasets"
ROWS = {("What is a bell?", "You are kind."), ("Why?", ""), ("Ünïcode 漢字", "")}
QUESTION = "What is Deep Learning?"


class Kit(NamedTuple):
    """A Python with torch, the folder of llm-compressor beside it, and the demo model."""

    python: Path
    packages: Path
    model: Path

    def run(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """With nothing but what it needs of the environment."""
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.packages), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [str(self.python), "-P", *map(str, argv)], env=variables, capture_output=True, text=True, check=False
        )

    def read(self, dataset: Path, folder: Path, samples: int = 10) -> tuple[str, set[tuple[str, str]]]:
        """What dataset.py says, and the rows that it writes."""
        target = folder / "text.jsonl"
        done = self.run(SCRIPTS / "dataset.py", dataset, target, "--samples", str(samples))
        if done.returncode:
            assert not target.exists()
            return done.stderr, set()
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        return done.stdout, {(row["question"], row["system_prompt"]) for row in rows}


@pytest.fixture(scope="module")
def kit() -> Kit:
    python = environment.ensure_environment(os.environ)
    packages = fp8.ensure_llm_compressor(os.environ, python)
    return Kit(python, packages, environment.ensure_demo_model(os.environ, python))


@pytest.mark.parametrize(
    "name", ["pandas-1.5.pkl", "pandas-2.3-string.pkl", "pandas-3.1-no-pyarrow.pkl", "questions.parquet"]
)
def test_a_dataset_of_any_pandas_is_read(kit: Kit, tmp_path: Path, name: str) -> None:
    said, rows = kit.read(DATASETS / name, tmp_path)
    assert said == f"Calibrating with 3 questions of {DATASETS / name}.\n"
    assert rows == ROWS


def test_a_dataset_of_plain_text_or_packed_is_read(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"question": "What is a bell?", "system_prompt": "You are kind.", "id": 1}\n'
        '{"question": "Why?", "system_prompt": null}\n'
        '{"question": "\\u00dcn\\u00efcode 漢字", "system_prompt": ""}\n'
        '{"question": "", "system_prompt": "left out"}\n',
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text(
        "system_prompt,question\nYou are kind.,What is a bell?\n,Why?\n,Ünïcode 漢字\n", encoding="utf-8"
    )
    (tmp_path / "a.pkl.gz").write_bytes(gzip.compress((DATASETS / "pandas-1.5.pkl").read_bytes()))
    for name in ("a.jsonl", "a.csv", "a.pkl.gz"):
        assert kit.read(tmp_path / name, tmp_path)[1] == ROWS, name


def test_a_spreadsheets_habits_are_no_matter(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text("\ufeffquestion,system_prompt\nWhat is a bell?,You are kind.,\n", encoding="utf-8")
    assert kit.read(tmp_path / "A.CSV", tmp_path)[1] == {("What is a bell?", "You are kind.")}


def test_numbers_and_dates_in_text_stay_text(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,system_prompt\n007,2026-01-01\nNA,1e5\n")
    (tmp_path / "a.jsonl").write_text('{"question": "007", "system_prompt": "2026-01-01"}\n')
    assert kit.read(tmp_path / "a.csv", tmp_path)[1] == {("007", "2026-01-01"), ("NA", "1e5")}
    assert kit.read(tmp_path / "a.jsonl", tmp_path)[1] == {("007", "2026-01-01")}


def test_as_many_rows_are_drawn_as_are_asked_for_and_the_same_each_time(kit: Kit, tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    file.write_text("question,system_prompt\n" + "".join(f"question {number},\n" for number in range(100)))
    said, rows = kit.read(file, tmp_path, samples=7)
    assert "Calibrating with 7 questions" in said
    assert len(rows) == 7
    assert kit.read(file, tmp_path, samples=7)[1] == rows != {(f"question {number}", "") for number in range(7)}


def test_gaudis_scripts_get_a_pickle_that_we_wrote(kit: Kit, tmp_path: Path) -> None:
    target = tmp_path / "mine.pkl"
    assert kit.run(SCRIPTS / "dataset.py", DATASETS / "pandas-1.5.pkl", target, "--samples", "2").returncode == 0
    # As step 1 of their scripts reads it.
    program = "import pandas, sys; f = pandas.read_pickle(sys.argv[1]); print(len(f), *f.columns)"
    assert kit.run("-c", program, target).stdout == "2 question system_prompt\n"


class Evil:
    """Its pickle calls whatever it is given."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def named(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls what is of that name, which this Python need not have."""
    parts = b"".join(b"X" + len(text).to_bytes(4, "little") + text for text in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + parts + b"tR."


def malicious(mark: Path) -> dict[str, bytes]:
    """Pickles that would make the file `mark` if they were let, or that are none."""
    command = f"touch {mark}"
    frame = (DATASETS / "pandas-1.5.pkl").read_bytes()
    return {
        "os.system": pickle.dumps(Evil(os.system, command)),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        "exec": pickle.dumps(Evil(exec, f"open({str(mark)!r}, 'w')")),
        "open": pickle.dumps(Evil(open, str(mark), "w")),
        "subprocess": pickle.dumps(Evil(subprocess.getoutput, command)),
        "getattr": named("builtins", "getattr", b"a", b"b"),
        "in a list": pickle.dumps([1, {"a": Evil(os.system, command)}]),
        "pandas.eval": named("pandas", "eval", f"@__import__('os').system({command!r})".encode()),
        "pandas.read_pickle": named("pandas", "read_pickle", str(mark).encode()),
        "pandas' own import": named("pandas.compat._optional", "import_optional_dependency", b"this"),
        "numpy.load": named("numpy", "load", str(mark).encode()),
        "numpy's runner": named("numpy.testing", "runstring", command.encode(), b"{}"),
        "through a dot": b"\x80\x04\x8c\x06pandas\x8c\x12DataFrame.to_pickle\x93" + b"\x8c\x01a\x85R.",
        "a module of ours": named("dataset", "subprocess", b""),
        "posix": b"cposix\nsystem\n(V" + command.encode() + b"\ntR.",
        "after a good one": frame[:-1] + pickle.dumps(Evil(os.system, command)),
        "persistent": b"Pos.system\n.",
        "a registered extension": b"\x80\x02\x82\x01.",
        "cut off": frame[: len(frame) // 2],
        "empty": b"",
        "no pickle": b"question,system_prompt\n",
        "a giant of bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "a giant": b"\x80\x04]\x94(" + b"\x8d" + (2**62).to_bytes(8, "little"),
        # What is refused by no name: made of nothing but an array's own parts.
        **{file.stem: file.read_bytes() for file in sorted((DATASETS / "hostile").iterdir())},
        "another thing": pickle.dumps({"question": ["a"], "system_prompt": ["b"]}),
    }


@pytest.mark.parametrize("name", sorted(malicious(Path("mark"))))
def test_a_pickle_runs_nothing(kit: Kit, tmp_path: Path, name: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.pkl"
    file.write_bytes(malicious(mark)[name])
    said, rows = kit.read(file, tmp_path)
    assert not rows
    assert not mark.exists()
    assert said.startswith(f"vllm-gateway: the dataset {file} cannot be used: ")
    assert said.count("\n") == 1


def test_the_evil_ones_are_evil(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(malicious(mark)["in a list"])
    assert mark.exists()


def test_strings_of_pyarrow_are_refused_with_a_way_out(kit: Kit, tmp_path: Path) -> None:
    said, _ = kit.read(DATASETS / "pandas-3.1.pkl", tmp_path)
    assert "asks for pyarrow.lib." in said
    assert said.endswith("save it as .jsonl or .parquet where it was made.\n")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "question,prompt\na,b\n", "it has no column system_prompt, only question, prompt"),
        ("a.jsonl", '{"text": "a"}\n', "it has no column question and no column system_prompt, only text"),
        ("a.jsonl", '{"question": 5, "system_prompt": "b"}\n', "question of row 0 is a int, not text"),
        ("a.jsonl", '{"question": ["a"], "system_prompt": "b"}\n', "question of row 0 is a list, not text"),
        ("a.jsonl", "{", "it cannot be read ("),
        ("a.jsonl", "", "it has no row with a question"),
        ("a.jsonl", "[1]", "row 0 is a list, not an object"),
        ("a.jsonl", "[" * 200_000, "it cannot be read (RecursionError"),
        ("a.csv", "question,system_prompt\na,b,c\n", "a row has more fields than the first line has names: 'a'…"),
        ("a.csv", "question,system_prompt\n", "it has no row with a question"),
        ("a.csv", "", "it has no column question and no column system_prompt, only nothing"),
        ("a.parquet", "nothing of the kind", "it cannot be read ("),
        ("a.pkl.gz", "nothing of the kind", "it cannot be read ("),
        ("a.txt", "question", "its name ends with none of .jsonl, .csv, .parquet, .pkl, .pkl.gz"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(kit: Kit, tmp_path: Path, name: str, text: str, expected: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    said, _ = kit.read(file, tmp_path)
    assert said.startswith(f"vllm-gateway: the dataset {file} cannot be used: {expected}"), said
    assert said.count("\n") == 1


def test_a_parquet_without_the_columns_and_a_file_that_is_not_there_are_said(kit: Kit, tmp_path: Path) -> None:
    assert "cannot be read (" in kit.read(tmp_path / "none.csv", tmp_path)[0]
    kit.run("-c", "import pandas, sys; pandas.DataFrame({'a': ['b']}).to_parquet(sys.argv[1])", tmp_path / "a.parquet")
    assert "question" in kit.read(tmp_path / "a.parquet", tmp_path)[0]


def quantize(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """As a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", "quantize", *map(str, argv)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def dynamic(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint made without data, and what was said."""
    folder = tmp_path_factory.mktemp("dynamic") / "demo"
    done = quantize(kit.model, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def calibrated(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint made with a dataset, and what was said."""
    folder = tmp_path_factory.mktemp("calibrated") / "demo"
    done = quantize(kit.model, folder, "--dataset", DATASETS / "pandas-1.5.pkl", "--samples", "2", "--length", "64")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def scheme(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = found["config_groups"].values()
    assert found["ignore"] == ["lm_head"]
    assert group["weights"]["type"] == group["input_activations"]["type"] == "float"
    assert group["weights"]["num_bits"] == group["input_activations"]["num_bits"] == 8
    return dict(group["input_activations"])


def test_a_checkpoint_is_made_without_data_and_reported(kit: Kit, dynamic: tuple[Path, str]) -> None:
    folder, said = dynamic
    assert scheme(folder)["dynamic"] is True
    before, after = ((each / "model.safetensors").stat().st_size for each in (kit.model, folder))
    assert f"{folder}: {kit.model} as FP8_DYNAMIC." in said
    assert f"Size: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.0%})." in said
    assert 0.2 < after / before < 0.5
    found = re.search(r"Greedy answers: (\d+) of (\d+) tokens as before \((.*)%\), (\d) of 8 answers", said)
    assert found
    assert 0.95 * int(found[2]) <= int(found[1]) <= int(found[2])
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in folder.iterdir())
    assert [entry.name for entry in folder.parent.iterdir()] == ["demo"]


# What flows into every layer at the same questions, by torch itself; prints the largest of each.
_LARGEST = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1], [json.loads(line) for line in open(sys.argv[2])]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
largest = {}
def watch(name):
    def hook(module, given):
        largest[name] = max(largest.get(name, 0.0), given[0].abs().max().item())
    return hook
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        module.register_forward_pre_hook(watch(name))
for row in rows:
    messages = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
    messages.append({"role": "user", "content": row["question"]})
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        model(given["input_ids"][:, :64])
print(json.dumps(largest))
"""
_SCALES = """
import json, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    names = {name: file.get_tensor(name) for name in file.keys()}
print(json.dumps({name.removesuffix(".input_scale"): float(scale) for name, scale in names.items()
                  if name.endswith(".input_scale")} | {"types": sorted({str(one.dtype) for one in names.values()})}))
"""


def test_a_calibrated_checkpoint_has_the_scales_of_its_dataset(
    kit: Kit, calibrated: tuple[Path, str], tmp_path: Path
) -> None:
    folder, said = calibrated
    assert "Calibrating with 2 questions of" in said
    assert f"{folder}: {kit.model} as FP8." in said
    assert scheme(folder)["dynamic"] is False
    kit.read(DATASETS / "pandas-1.5.pkl", tmp_path, samples=2)
    largest = json.loads(kit.run("-c", _LARGEST, kit.model, tmp_path / "text.jsonl").stdout)
    scales = json.loads(kit.run("-c", _SCALES, folder / "model.safetensors").stdout)
    assert "torch.float8_e4m3fn" in scales.pop("types")
    # 448 is the largest number of eight bits that FP8 (E4M3) has.
    assert scales == {name: pytest.approx(most / 448, rel=1e-3) for name, most in largest.items()}
    assert len(scales) == 3 * 7


def test_a_model_that_fp8_changes_is_reported_as_changed(kit: Kit, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM; "
        "torch.manual_seed(1); config = LlamaConfig.from_pretrained(sys.argv[1]); config.initializer_range = 0.2; "
        "LlamaForCausalLM(config).save_pretrained(sys.argv[2]); "
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    assert kit.run("-c", program, kit.model, tmp_path / "random").returncode == 0
    done = quantize(tmp_path / "random", tmp_path / "made")
    found = re.search(r"Greedy answers: (\d+) of (\d+) tokens", done.stdout)
    assert found
    assert int(found[1]) < 0.9 * int(found[2])


def test_vllm_serves_it_with_the_right_answers_through_the_gateway(dynamic: tuple[Path, str], tmp_path: Path) -> None:
    python = environment.ensure_environment(os.environ)
    settings = build(ModelServerSettings, None, port=free_port())
    command = launch(settings, python, str(dynamic[0]), os.environ, demo=True, local=True)
    log = tmp_path / "vllm.log"
    with ModelServer(command, settings.port, log) as server:
        server.wait_ready()
        with running(server.url) as one, one.client() as client:
            call = {"messages": {"system": "You are kind.", "user": QUESTION}, "max_new_tokens": 60}
            whole = client.post("/v1/chat/completions", json={**call, "streaming": False}).json()
            assert whole["text"].startswith("Deep learning is a branch of machine learning that trains neural networks")
            streamed = client.post("/v1/chat/completions", json={**call, "streaming": True}).text
            assert "neural" in streamed
            openai = {"model": DEMO_NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
            reply = client.post("/v1/chat/completions", json=openai).json()
            assert reply["choices"][0]["message"]["content"] == whole["text"]
    assert "CompressedTensorsW8A8Fp8" in log.read_text()


# As a download that was cut off leaves it.
_WITHOUT_A_LAYER = """
import sys
from safetensors import safe_open
from safetensors.torch import save_file
with safe_open(sys.argv[1], "pt") as file:
    kept = {name: file.get_tensor(name) for name in file.keys() if ".layers.1." not in name}
save_file(kept, sys.argv[1], metadata={"format": "pt"})
"""


def test_what_cannot_be_quantized_is_said_and_nothing_is_left(
    kit: Kit, dynamic: tuple[Path, str], tmp_path: Path
) -> None:
    done = quantize(dynamic[0], tmp_path / "made")
    assert done.returncode == 1
    assert f"vllm-gateway: {dynamic[0]} is quantized already (compressed-tensors)" in done.stderr
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    done = quantize(kit.model, tmp_path / "made", "--dataset", tmp_path / "bad.csv")
    assert done.returncode == 1
    assert "it has no column question and no column system_prompt" in done.stderr
    (tmp_path / "odd").mkdir()
    done = quantize(tmp_path / "odd", tmp_path / "made")
    assert done.returncode == 1
    assert "has no config.json that can be read" in done.stderr
    shutil.copytree(kit.model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    done = quantize(tmp_path / "broken", tmp_path / "made")
    assert done.returncode == 1
    assert f"vllm-gateway: {tmp_path / 'broken'} cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.copytree(kit.model, tmp_path / "partly")
    assert kit.run("-c", _WITHOUT_A_LAYER, tmp_path / "partly" / "model.safetensors").returncode == 0
    done = quantize(tmp_path / "partly", tmp_path / "made")
    assert done.returncode == 1
    assert f"{tmp_path / 'partly'} lacks 9 of its weights, model.layers.1." in done.stderr
    done = quantize(kit.model, tmp_path / "bad.csv" / "made")
    assert done.returncode == 1
    assert "Quantizing" not in done.stdout
    assert f"{tmp_path / 'bad.csv' / 'made'} cannot be written: File exists." in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.csv", "broken", "odd", "partly"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_leaves_nothing(kit: Kit, tmp_path: Path, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "gateway", "quantize", str(kit.model), str(tmp_path / "made")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("Asking it"):
                process.send_signal(number)
                break
        started = time.monotonic()
        assert process.wait(30) == 128 + number
        assert time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())


def test_one_that_finds_its_folder_taken_leaves_it(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = quantize(kit.model, tmp_path / "mine")
    assert done.returncode == 1
    assert done.stderr == f"vllm-gateway: {tmp_path / 'mine'} exists already: remove it, or name another folder.\n"
    assert (tmp_path / "mine").read_text() == "precious"

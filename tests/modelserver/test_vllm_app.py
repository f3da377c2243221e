"""From vllm-app's config.json to vLLM's model and options."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.modelserver import vllm_app, vllm_args

# As it comes with vllm-app.
WHOLE = {
    "model_path": "./models/language_model/GRPO-Vi-Qwen2-7B-RAG-W4A16",
    "cuda_graph_mode": "piecewise",
    "cuda_graph_capture_sizes": [1, 2, 4, 8, 512],
    "keep_first_token": False,
    "max_tokens": 2048,
    "temperature": 0.5,
    "top_p": 0.85,
    "top_k": 25,
    "repetition_penalty": 1.1,
}


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Each option that is made of it, and the object that is its value."""
    made = vllm_app.from_config(config, Path("/app")).options
    return {option: json.loads(value) for option, value in zip(made[::2], made[1::2], strict=True)}


def test_what_comes_with_vllm_app() -> None:
    assert vllm_app.from_config(WHOLE, Path("/app")).model == "/app/models/language_model/GRPO-Vi-Qwen2-7B-RAG-W4A16"
    sampling = {"temperature": 0.5, "top_p": 0.85, "top_k": 25, "repetition_penalty": 1.1, "max_new_tokens": 2048}
    assert options(WHOLE) == {
        "--compilation-config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 512]},
        "--override-generation-config": sampling,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"keep_first_token": True}, {}),
        (dict.fromkeys(WHOLE), {}),
        ({"model_path": "", "cuda_graph_mode": "", "cuda_graph_capture_sizes": []}, {}),
        ({"cuda_graph_mode": "full"}, {"--compilation-config": {"cudagraph_mode": "FULL"}}),
        (
            {"cuda_graph_mode": "full_and_piecewise"},
            {"--compilation-config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
        ),
        ({"cuda_graph_capture_sizes": [4, 1]}, {"--compilation-config": {"cudagraph_capture_sizes": [4, 1]}}),
        ({"temperature": 0, "top_k": -1}, {"--override-generation-config": {"temperature": 0, "top_k": -1}}),
        ({"max_tokens": 1}, {"--override-generation-config": {"max_new_tokens": 1}}),
    ],
)
def test_each_key_may_be_missing(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert options(config) == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "it must be an object of vllm-app's keys."),
        ({"temprature": 1}, "temprature is not a key of vllm-app's: did you mean temperature?"),
        ({"architectures": []}, "architectures is not a key of vllm-app's: remove it, or name vllm-app's own file."),
        ({"model_path": 7}, "model_path must be a folder or a hub's ORG/NAME, but it is 7."),
        ({"model_path": "a\0"}, 'model_path must be a folder or a hub\'s ORG/NAME, but it is "a\\u0000".'),
        (
            {"cuda_graph_mode": "fast"},
            'cuda_graph_mode must be one of piecewise, full, full_decode_only, full_and_piecewise, but it is "fast".',
        ),
        (
            {"cuda_graph_capture_sizes": [1, "2"]},
            'cuda_graph_capture_sizes must be a list of whole numbers, each 1 or more, but it is [1, "2"].',
        ),
        ({"keep_first_token": 0}, "keep_first_token must be true or false, but it is 0."),
        ({"max_tokens": 2048.0}, "max_tokens must be a whole number, 1 or more, but it is 2048.0."),
        ({"max_tokens": True}, "max_tokens must be a whole number, 1 or more, but it is true."),
        ({"temperature": "hot"}, 'temperature must be a number from 0 to 2, but it is "hot".'),
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2, but it is 2.1."),
        ({"top_p": 0}, "top_p must be a number above 0, at most 1, but it is 0."),
        ({"top_k": 0.5}, "top_k must be a whole number, -1 or more, but it is 0.5."),
        (
            {"repetition_penalty": float("inf")},
            "repetition_penalty must be a number above 0, but it is Infinity.",
        ),
    ],
)
def test_what_is_wrong_is_named(config: Any, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(vllm_args.OptionError) as raised:
        vllm_app.read(file)
    assert str(raised.value) == f"{file} (VLLM_APP_CONFIG): {sentence}"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("./models/a", "{}/models/a"),
        ("models/a", "{}/models/a"),
        ("models/b", "models/b"),
        ("./models/b", "{}/models/b"),
        ("/srv/a", "/srv/a"),
        ("Org/Name", "Org/Name"),
    ],
)
def test_a_folder_is_seen_from_the_files_own(
    path: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_path": path}))
    assert vllm_app.read(tmp_path / "config.json").model == model.format(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert vllm_app.read("config.json").model == model.format(tmp_path)


@pytest.mark.parametrize("none", [None, ""])
def test_without_a_file_there_is_nothing(none: str | None) -> None:
    assert vllm_app.read(none) == (None, [])


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000], ids=["open", "empty", "binary", "deep"])
def test_a_file_that_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(vllm_args.OptionError) as raised:
        vllm_app.read(file)
    assert str(raised.value).startswith(f"{file} (VLLM_APP_CONFIG) is no JSON (")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(vllm_args.OptionError) as raised:
        vllm_app.read(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} (VLLM_APP_CONFIG) cannot be read (Is a directory): name vllm-app's config.json."
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["piecewise", "Org/Name"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*WHOLE, "other"]), VALUES) | VALUES)
def test_any_json_is_translated_or_refused(config: Any) -> None:
    with contextlib.suppress(vllm_args.OptionError):
        app = vllm_app.from_config(config, Path("/app"))
        assert all(isinstance(json.loads(value), dict) for value in app.options[1::2])
        assert all("\0" not in word for word in [app.model or "", *app.options])


def test_a_file_as_windows_writes_it_will_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"temperature": 0.5}), encoding="utf-8-sig")
    assert vllm_app.read(file).options == ["--override-generation-config", '{"temperature": 0.5}']

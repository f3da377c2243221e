"""Secrets in files: found by the settings wherever the file is named, and never both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.config.environment import SettingsError
from gateway.config.load import build, child_environment, load
from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.secret_files import NAMES
from gateway.config.settings import Settings, names_of


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("GATEWAY_", "LLM_", "OPEA_", "HF_", "HUGGING_FACE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("s3cret\n")
    return file


def test_every_secret_may_stand_in_a_file() -> None:
    kinds = (Settings, ModelServerSettings)
    secrets = {
        name
        for kind in kinds
        for field, about in kind.model_fields.items()
        for name in names_of(field, kind)
        if "SecretStr" in str(about.annotation) and field != "api_keys"
    }
    assert secrets == set(NAMES)


@pytest.mark.parametrize("name", ["GATEWAY_UPSTREAM_API_KEY", "LLM_VLLM_API_KEY"])
@pytest.mark.parametrize("quotes", ["", '"'])
def test_a_secret_of_the_environment_is_read(
    name: str, quotes: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{name}_FILE", f"{quotes}{file}{quotes}")
    settings, _, warnings = load()
    assert settings.upstream_api_key is not None
    assert (settings.upstream_api_key.get_secret_value(), warnings) == ("s3cret", [])


def test_a_secret_of_the_file_of_settings_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(f"LLM_VLLM_API_KEY_FILE={file}\nHF_TOKEN_FILE={file}\n")
    settings, *_ = load(tmp_path / ".env")
    assert settings.upstream_api_key is not None
    assert settings.upstream_api_key.get_secret_value() == "s3cret"
    token = build(ModelServerSettings, tmp_path / ".env").hf_token
    assert token is not None
    assert token.get_secret_value() == "s3cret"
    monkeypatch.setenv("LLM_VLLM_API_KEY", "of the environment")
    assert child_environment(tmp_path / ".env")["LLM_VLLM_API_KEY"] == "of the environment"


def test_the_environments_file_beats_the_secret_of_the_file_of_settings(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("LLM_VLLM_API_KEY=other\n")
    monkeypatch.setenv("LLM_VLLM_API_KEY_FILE", str(file))
    settings, *_ = load(tmp_path / ".env")
    assert settings.upstream_api_key is not None
    assert settings.upstream_api_key.get_secret_value() == "s3cret"
    child = child_environment(tmp_path / ".env")
    assert child["LLM_VLLM_API_KEY"] == "s3cret"
    assert "LLM_VLLM_API_KEY_FILE" not in child


def test_a_child_gets_what_was_read_and_not_the_name_of_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `docker run --env-file` leaves them.
    monkeypatch.setenv("HF_TOKEN", '""')
    monkeypatch.setenv("HF_TOKEN_FILE", f'"{file}"')
    child = child_environment()
    assert child["HF_TOKEN"] == "s3cret"
    assert "HF_TOKEN_FILE" not in child


def test_what_is_empty_is_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY_FILE", "")
    assert load()[0].upstream_api_key is None


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (None, "cannot be read (No such file or directory): name a file that can."),
        (b" \n", "is empty: write the secret into it, or unset GATEWAY_UPSTREAM_API_KEY_FILE."),
        (b"\xff\xfe", "is wrong: it is not UTF-8."),
    ],
)
def test_a_file_without_a_secret_stops_the_start(
    written: bytes | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if written is not None:
        (tmp_path / "secret").write_bytes(written)
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY_FILE", str(tmp_path / "secret"))
    with pytest.raises(SettingsError) as raised:
        load()
    assert str(raised.value) == f"GATEWAY_UPSTREAM_API_KEY_FILE {str(tmp_path / 'secret')!r} {why}"


def test_a_secret_in_a_file_and_beside_it_stops_the_start(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY", "other")
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY_FILE", str(file))
    with pytest.raises(SettingsError) as raised:
        load()
    assert str(raised.value) == (
        "GATEWAY_UPSTREAM_API_KEY and GATEWAY_UPSTREAM_API_KEY_FILE are both set: unset one of them."
    )


def test_a_wrong_secret_of_a_file_is_not_in_the_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("hid den")
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY_FILE", str(file))
    with pytest.raises(SettingsError) as raised:
        load()
    assert "hid" not in str(raised.value)

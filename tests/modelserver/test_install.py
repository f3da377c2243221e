"""The cache folder: what is installed once, found again, and never taken for complete when it is not."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from gateway.modelserver import demo_model, install
from gateway.modelserver.preflight import CannotStart
from gateway.progress import Display


def quiet() -> Display:
    return Display(Console(file=io.StringIO()))


def at(folder: Path) -> dict[str, str]:
    """The environment of a user whose cache folder is below `folder`."""
    return os.environ | {"XDG_CACHE_HOME": str(folder)}


def installed(base: Path) -> Path:
    folder = install.environment_folder(install.cache_folder(at(base)))
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (folder / "complete.json").write_text("{}")
    return python


def stand_in(base: Path, script: str) -> Path:
    """A Python for the build of the demo model, whose third argument is the folder."""
    python = base / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def test_the_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    assert install.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "vllm-gateway"
    assert install.cache_folder({}) == Path.home() / ".cache" / "vllm-gateway"
    assert install.cache_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "vllm-gateway"


def test_an_installed_environment_is_used_again(tmp_path: Path) -> None:
    python = installed(tmp_path)
    assert install.ensure_environment(at(tmp_path), quiet()) == python


def test_an_interrupted_install_is_made_anew_and_a_failed_one_is_told(tmp_path: Path) -> None:
    python = installed(tmp_path)
    folder = python.parent.parent
    (folder / "complete.json").unlink()
    left = folder / "left-over"
    left.touch()
    # No index: pip's own failure, without any network.
    environ = at(tmp_path) | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    with pytest.raises(CannotStart, match=r"cannot be installed: .* All that was said is in .*install\.log"):
        install.ensure_environment(environ, quiet())
    assert not left.exists()
    assert not (folder / "complete.json").exists()


def test_another_install_is_waited_for(tmp_path: Path) -> None:
    python = installed(tmp_path)
    found: list[Path] = []
    with (tmp_path / "vllm-gateway" / "install.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Event()

        class Told(io.StringIO):
            def flush(self) -> None:
                if "Waiting for another" in self.getvalue():
                    waiting.set()

        said = Told()
        thread = threading.Thread(
            target=lambda: found.append(install.ensure_environment(at(tmp_path), Display(Console(file=said))))
        )
        thread.start()
        assert waiting.wait(10)
        assert not found
    thread.join(10)
    assert found == [python]


def test_a_demo_model_is_built_once_and_an_older_one_removed(tmp_path: Path) -> None:
    build = stand_in(tmp_path, 'mkdir -p "$3" && echo "{}" > "$3/demo-model.json" && echo x >> "$3/count"')
    older = install.cache_folder(at(tmp_path)) / "demo-model-older"
    older.mkdir(parents=True)
    folder = demo_model.ensure_demo_model(at(tmp_path), build, quiet())
    assert demo_model.ensure_demo_model(at(tmp_path), build, quiet()) == folder
    assert (folder / "count").read_text() == "x\n"
    assert not older.exists()


def test_a_demo_model_that_cannot_be_built_is_told_with_the_last_line(tmp_path: Path) -> None:
    build = stand_in(tmp_path, 'echo "step 1 of 2 loss 1.0"; echo "no memory"; exit 3')
    with pytest.raises(CannotStart, match=r"The demo model cannot be built: no memory\. .*demo-model\.log"):
        demo_model.ensure_demo_model(at(tmp_path), build, quiet())


def test_a_build_that_was_killed_is_told_with_the_signal(tmp_path: Path) -> None:
    build = stand_in(tmp_path, "kill -9 $$")
    with pytest.raises(CannotStart, match="The demo model cannot be built: it was ended by SIGKILL"):
        demo_model.ensure_demo_model(at(tmp_path), build, quiet())


def test_a_demo_model_is_written_to_a_new_folder_alone(tmp_path: Path) -> None:
    build = stand_in(
        tmp_path, 'mkdir -p "$3" && echo "{}" > "$3/demo-model.json"; chmod 755 "$3"; chmod 644 "$3/demo-model.json"'
    )
    target = tmp_path / "target"
    demo_model.write_demo_model(target, at(tmp_path), python=build, display=quiet())
    assert json.loads((target / "demo-model.json").read_text()) == {}
    assert (target / "demo-model.json").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    with pytest.raises(CannotStart, match="exists and is not an empty folder"):
        demo_model.write_demo_model(target, at(tmp_path), python=build, display=quiet())


def test_pips_progress_is_read_from_its_lines_and_its_folder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("a==1 --hash=x\nb==1 --hash=x\nc==1 ; sys_platform == 'win32' --hash=x\n")
    seen: list[float] = []
    watch = install._PipProgress(lock, tmp_path, lambda share, note="": seen.append(share))
    lines = ["Ignoring c: markers", "Collecting a==1", "  Downloading a.whl (1 MB)", "noise", "Collecting b==1"]
    for line in [*lines, "Installing collected packages: a, b"]:
        watch(line)
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("a-1.dist-info", "b-1.dist-info"):
        (site / name).mkdir(parents=True)
        watch("")
    assert seen == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 1.0]


def test_the_demo_model_script_needs_nothing_to_tell_its_usage() -> None:
    script = Path(install.__file__).parent / "scripts/demo_model.py"
    done = subprocess.run([sys.executable, "-P", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "usage: demo_model.py FOLDER"

"""The wheel has the whole package: every room, the page's own files, the locks and the model server's programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from tests.support.paths import ROOT

# A lock is made from it, and is what is installed.
SOURCES_OF_LOCKS = {".in"}


def test_the_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(ROOT / "gateway", source / "gateway", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip calls it
    # On a machine without a C compiler, too, it is one for every machine.
    environment = {**os.environ, "PATH": "", "CC": "no-such-cc"}
    subprocess.run(
        [sys.executable, "-c", build, str(made)], check=True, cwd=source, stdout=subprocess.DEVNULL, env=environment
    )
    (wheel,) = made.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("gateway/")}
    files = (path for path in (source / "gateway").rglob("*") if path.is_file())
    assert found == {str(path.relative_to(source)) for path in files if path.suffix not in SOURCES_OF_LOCKS}

"""The unit of docs/operate.md, as systemd reads it. Needs systemd-analyze; `make test-restarts` runs it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from gateway.config.settings import CLOSING_TIME, Settings
from tests.support.paths import ROOT

(UNIT,) = re.findall(r"^```ini\n(.*?)^```", (ROOT / "docs/operate.md").read_text(), re.MULTILINE | re.DOTALL)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "vllm-gateway"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "vllm-gateway.service"
    # systemd looks for the program and the user.
    here = UNIT.replace("/opt/vllm-gateway/current/bin/vllm-gateway", str(program))
    unit.write_text(here.replace("User=vllm-gateway", "User=root"))

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )

    about_ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "vllm-gateway" in line]
    assert (done.returncode, about_ours) == (0, [])


def test_the_unit_waits_for_the_drain() -> None:
    settings = Settings()
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert f"GATEWAY_STOP_GRACE={stop}s" in UNIT
    assert int(stop) >= settings.drain_delay + settings.drain_timeout + CLOSING_TIME

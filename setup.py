"""Has the modules on the way of a call compiled by mypyc, where GATEWAY_COMPILE=1 asks for it (docs/performance.md)."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from shutil import which

from setuptools import Extension, setup

# What a call runs through. A class in these has no base but one of these, as mypyc frees wrongly what has another.
COMPILED = (
    "gateway/wire/body_edit.py",
    "gateway/wire/client_address.py",
    "gateway/wire/head_cache.py",
    "gateway/wire/heads.py",
    "gateway/wire/key_marks.py",
    "gateway/wire/pieces.py",
    "gateway/wire/routes.py",
    "gateway/wire/sse.py",
    "gateway/admission/buffers.py",
    "gateway/dialects/body_limits.py",
    "gateway/dialects/json_body.py",
    "gateway/dialects/media_urls.py",
    "gateway/dialects/reader.py",
    "gateway/dialects/simplified.py",
    "gateway/dialects/field_names.py",
    "gateway/dialects/streams.py",
    "gateway/pool/upstream_pool.py",
    "gateway/pool/prefixes.py",
    "gateway/relay/buffered_call.py",
    "gateway/relay/data_path.py",
    "gateway/relay/exchange.py",
    "gateway/relay/keyed_record.py",
    "gateway/relay/record.py",
    "gateway/relay/streamed_answer.py",
    "gateway/relay/time_limits.py",
    "gateway/relay/upload.py",
    "gateway/relay/usage.py",
    "gateway/upstream/connection.py",
    "gateway/observability/request_metrics.py",
    "gateway/observability/request_log.py",
    "gateway/observability/histograms.py",
    "gateway/finished_requests.py",
)


def compiled() -> list[Extension]:
    """None where nothing asks for them; ends with what is missing where something does, and they cannot be made."""
    wish = os.environ.get("GATEWAY_COMPILE", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"GATEWAY_COMPILE must be 1 or 0, but it is {wish!r}.")
    if wish != "1":
        return []
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not which(compiler):
        sys.exit(f"GATEWAY_COMPILE=1 needs the C compiler {compiler} (Debian: apt install gcc libc6-dev).")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit("GATEWAY_COMPILE=1 needs the headers of Python (Debian: apt install python3-dev).")
    try:
        from mypyc.build import mypycify
    except ImportError:
        sys.exit(
            "GATEWAY_COMPILE=1 needs mypy and what the gateway itself needs: pip install -r requirements/compile.lock "
            "-r requirements/image.lock, then build with --no-build-isolation."
        )
    return list(mypycify(list(COMPILED), debug_level="0", group_name="vllm_gateway"))


setup(ext_modules=compiled())

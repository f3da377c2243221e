"""What runs in a model server's container: makes its data folder usable, starts vLLM, asks how it is.

    start.py own FOLDER UID GID    make the data folder that user's, or say why it cannot be
    start.py serve                 become `vllm serve`
    start.py healthy               exit with 0 if the vLLM beside it is

Mounted there beside gateway/vllmargs.py; whatever vLLM the image has, it needs nothing but Python.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from gateway import vllmargs

PORT = 8008

# What may be in a data folder that was made for this.
_OURS = {"cache", "demo-model", "fp8", "home", "inc"}


def own(folder: Path, uid: int, gid: int) -> None:
    """Give a new folder to that user; raises Wrong if the user could not write there, or not read what is mounted.

    One that holds what is not of this stack may be somebody's own, and is left as it is.
    """
    status = folder.stat()
    if status.st_uid == 0 and {entry.name for entry in folder.iterdir()} <= _OURS:
        os.chown(folder, uid, gid)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    for kept in (folder, *(folder / name for name in ("hub", "home", "cache"))):
        if kept.exists() and not os.access(kept, os.R_OK | os.W_OK | os.X_OK):
            owner = kept.stat().st_uid
            raise vllmargs.Wrong(
                f"{kept} (LLM_VLLM_DATA_DIR) belongs to user {owner}, and user {uid} cannot write there: "
                f"`sudo chown -R {uid}` the folder, or set UID={owner} in the .env file."
            )
    for mounted in (__file__, vllmargs.__file__):
        if not os.access(mounted, os.R_OK):
            raise vllmargs.Wrong(f"User {uid} cannot read {mounted}: `chmod -R a+rX` the repository's folder.")


def serve(environ: Mapping[str, str], data: Path) -> None:
    """Become `vllm serve`. Raises Wrong."""
    model = environ.get("LLM_VLLM_MODEL_NAME")
    if not model:
        raise vllmargs.Wrong(
            "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME, or a folder as /data/NAME, but it is not set."
        )
    found = vllmargs.environment(environ)
    options = vllmargs.options(environ)
    if environ.get("IF_FP8_QUANTIZATION", "").lower() in ("1", "true"):
        if environ.get("QUANTIZATION"):
            raise vllmargs.Wrong("QUANTIZATION and IF_FP8_QUANTIZATION are two ways of quantizing: unset one of them.")
        model, more = _in_fp8(model, environ, data)
        options = more + options
        if environ.get("LLM_DEVICE") == "hpu":
            found["QUANT_CONFIG"] = environ.get("QUANT_CONFIG") or str(_scales(model, data))
    command = ["vllm", "serve", model, "--host", "0.0.0.0", "--port", str(PORT), *options]
    shown = re.sub(r"(--api-key[ =])\S+", r"\1…", shlex.join(command))
    sys.stderr.write(f"Starting: {shown}\n")
    os.execvpe(command[0], command, found)


def _in_fp8(model: str, environ: Mapping[str, str], data: Path) -> tuple[str, list[str]]:
    """The checkpoint to serve in FP8, and the options for it, under the name of the one that it was made of."""
    device = environ.get("LLM_DEVICE", "cpu")
    checkpoint = data / "fp8" / Path(model).name
    prepared = device != "hpu" and (checkpoint / "config.json").exists()
    options = vllmargs.fp8(device, prepared=prepared)
    if not prepared:
        if device == "cpu":
            sys.stderr.write(f"There is no checkpoint in FP8 at {checkpoint}, so that only the cache is in FP8.\n")
        return model, options
    name = environ.get("SERVED_MODEL_NAME") or model
    return str(checkpoint), ["--served-model-name", name, *options]


def _scales(model: str, data: Path) -> Path:
    """Where calibration on this kind of Gaudi has left its scales; it writes the model's name in lower case."""
    folder = data / "inc" / Path(model).name.lower()
    found = sorted(folder.glob("maxabs_quant_g[23].json"))
    if len(found) == 1:
        return found[0]
    what = "are scales for Gaudi 2 and for Gaudi 3" if found else "are no scales"
    raise vllmargs.Wrong(f"There {what} in {folder}: set QUANT_CONFIG to the maxabs_quant_g2.json or _g3.json to use.")


def healthy() -> bool:
    """Whether the vLLM beside this says that it is; a proxy set for downloads is not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return bool(opener.open(f"http://127.0.0.1:{PORT}/health", timeout=3).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main(arguments: list[str]) -> int:
    """The exit status."""
    try:
        match arguments:
            case ["own", folder, uid, gid]:
                own(Path(folder), int(uid), int(gid))
            case ["serve"]:
                serve(os.environ, Path(os.environ.get("HF_HOME", "/data")))
            case ["healthy"]:
                return 0 if healthy() else 1
            case _:
                raise vllmargs.Wrong(f"no such command: {shlex.join(arguments)}")
    except (vllmargs.Wrong, OSError) as error:
        sys.stderr.write(f"vllm-gateway: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

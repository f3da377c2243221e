"""What runs in a model server's container: makes its data folder usable, starts vLLM, asks how it is.

    start.py own FOLDER UID GID    make the data folder that user's, or say why it cannot be
    start.py serve                 become `vllm serve`
    start.py healthy               exit with 0 if the vLLM beside it is

Mounted there beside gateway/vllmargs.py; whatever vLLM the image has, it needs nothing but Python.
"""

from __future__ import annotations

import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from gateway import vllmargs

PORT = 8008


def own(folder: Path, uid: int, gid: int) -> None:
    """Give a new folder to that user; raises Wrong if the user could not write there.

    One that has a hub's cache in it may be somebody's own, and is left as it is.
    """
    status = folder.stat()
    if status.st_uid == 0 and not (folder / "hub").exists():
        os.chown(folder, uid, gid)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise vllmargs.Wrong(
            f"The data folder (LLM_VLLM_DATA_DIR) belongs to user {status.st_uid}, and user {uid} cannot write there: "
            f"`sudo chown -R {uid} FOLDER`, or set UID={status.st_uid}."
        )


def serve(environ: Mapping[str, str]) -> None:
    """Become `vllm serve`. Raises Wrong."""
    model = environ.get("LLM_VLLM_MODEL_NAME")
    if not model:
        raise vllmargs.Wrong(
            "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME, or a folder as /data/NAME, but it is not set."
        )
    command = ["vllm", "serve", model, "--host", "0.0.0.0", "--port", str(PORT), *vllmargs.options(environ)]
    sys.stderr.write(f"Starting: {shlex.join(command)}\n")
    os.execvpe(command[0], command, vllmargs.environment(environ))


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
                serve(os.environ)
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

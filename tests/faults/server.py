"""Runs `mvl` commands for the fault tests from one process that has imported everything.

Reads requests, one JSON object a line, from standard input, and answers each with a line:

    {"mvl": [arguments], "log": file, "limits": {...}}  ->  {"code": exit code, "said": output}
    {"mount": folder, "bytes": size}                    ->  {"error": text, "" for none}
    {"read": [checkpoint, ...]}                         ->  {"digests": [...]}
    {"kills": number, "data": root, "folder": folder, "seed": number}
                                                        ->  {"made": [...], "found": {...}}

Whatever goes wrong in a request is answered as {"trouble": traceback}.

`limits` may hold "file_bytes" (RLIMIT_FSIZE of the command and its ranks) and "port" (the port the
supervisor believes to be free). A folder mounted here is seen by this process and its children
alone, since it runs in a mount namespace of its own where the system allows that.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import launch.cli
import launch.local
from megatron_vl.run.digest import checkpoint_digest
from tests.faults import forked
from tests.faults.killing import kill_and_compare


def _mvl(request: dict[str, Any]) -> dict[str, Any]:
    log, limits = Path(request["log"]), request.get("limits", {})
    log.unlink(missing_ok=True)
    arguments = [str(argument) for argument in request["mvl"]]
    code = forked.fork(lambda: _limited(arguments, limits), log, "wb").wait()
    return {"code": code, "said": log.read_text(errors="replace")}


def _limited(arguments: list[str], limits: dict[str, int]) -> int:
    if "file_bytes" in limits:
        size = limits["file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if "port" in limits:
        launch.local.free_port = lambda: limits["port"]
    return launch.cli.main(arguments)


def _mount(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["mount"])
    options = f"size={request['bytes']}" + (",remount" if os.path.ismount(folder) else "")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"error": done.stderr.strip() if done.returncode else ""}


def main() -> None:
    """Answer until standard input ends."""
    forked.become_template()
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception:
            answer = {"trouble": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if "mvl" in request:
        return _mvl(request)
    if "mount" in request:
        return _mount(request)
    if "kills" in request:
        folder, log = Path(request["folder"]), sys.stderr
        made, found = kill_and_compare(
            request["data"],
            folder,
            request["kills"],
            request["seed"],
            lambda line: print(line, file=log, flush=True),
        )
        return {"made": [asdict(kill) for kill in made], "found": found}
    return {"digests": [checkpoint_digest(path) for path in request["read"]]}


if __name__ == "__main__":
    main()

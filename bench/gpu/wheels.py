"""Wheels for a machine that cannot fetch any: collected here, unpacked there.

    python -m bench.gpu.wheels --python 3.12      # on a machine with a package index

puts the packages that `make gpu-check` needs and a CUDA image may lack into build/wheels. There,
`unpack` lays those that are missing into a temporary folder for PYTHONPATH; nothing is installed.
They are unpacked rather than imported from the archive because Triton reads its kernels' source.

mamba-ssm is built without its CUDA extension: its Triton kernels are plain Python. Its package file
imports the extension all the same, so that one file is left out and the kernels are imported by
their own names.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "wheels"

PACKAGES = {
    "megatron-core": "megatron.core",
    "omegaconf": "omegaconf",
    "einops": "einops",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "PyYAML": "yaml",
    "mamba-ssm": "mamba_ssm",
}
"""Distribution names, and the module that shows a package is there."""

# Published as sources only.
_SOURCE_ONLY = {"mamba-ssm"}


def versions() -> dict[str, str]:
    """The pinned version of each package; one that is not pinned gets the newest."""
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").split()
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    return {name: pins.get(name, "") for name in PACKAGES}


def collect(python: str) -> None:
    """Download or build the wheels for a Python version."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, version in versions().items():
        wanted = f"{name}=={version}" if version else name
        pip = [sys.executable, "-m", "pip"]
        if name in _SOURCE_ONLY:
            command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(FOLDER)]
        else:
            command = [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(FOLDER)]
            command += ["--python-version", python]
        environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
        subprocess.run([*command, wanted], check=True, env=environment, timeout=600)


def missing() -> list[str]:
    """Packages this interpreter lacks, by distribution name."""
    return [name for name, module in PACKAGES.items() if not _found(module)]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def unpack(folder: Path) -> list[str]:
    """Lay the wheels of missing packages into `folder`; returns what is still missing."""
    left = []
    for name in missing():
        stem = name.replace("-", "_").lower()
        wheels = [w for w in sorted(FOLDER.glob("*.whl")) if w.name.lower().startswith(stem + "-")]
        if wheels:
            with zipfile.ZipFile(wheels[-1]) as archive:
                members = [m for m in archive.namelist() if m != "mamba_ssm/__init__.py"]
                archive.extractall(folder, members)
        else:
            left.append(name)
    return left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    collect(parser.parse_args().python)
    print("\n".join(sorted(path.name for path in FOLDER.glob("*.whl"))))

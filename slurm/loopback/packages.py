"""Slurm's programs: which of them are here, where they are looked for, how to get them.

Debian's packages, installed (`INSTALL`) or unpacked into a folder without root by `fetch_packages`:
14 MB, two seconds. Refuses nothing; raises ClusterError where apt-get or dpkg is missing or fails.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
INSTALL = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
_LIBRARIES = ("libhwloc15", "liblua5.1-0", "libmunge2", "slurm-wlm-basic-plugins")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


class ClusterError(RuntimeError):
    """The cluster cannot be brought up; the message says why and what to do."""


def missing_programs(prefix: Path | None = None) -> list[str]:
    """The programs of Slurm and munge that are not here (or not in an unpacked prefix)."""
    path = search_path(prefix)
    return [name for name in _PROGRAMS if shutil.which(name, path=path) is None]


def search_path(prefix: Path | None) -> str:
    """Where programs are looked for; sbin too, which a user's PATH often lacks."""
    usual = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    if prefix is None:
        return usual
    return ":".join(str(prefix / part) for part in ("bin", "usr/bin", "usr/sbin")) + ":" + usual


def library(prefix: Path) -> Path:
    """Where an unpacked prefix keeps its shared libraries."""
    return prefix / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"


def fetch_packages(prefix: Path) -> None:
    """Download Debian's packages and unpack them into a folder: Slurm without root.

    Raises ClusterError where apt-get or dpkg is missing or fails.
    """
    prefix.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="slurm-packages-") as folder:
            _run(["apt-get", "download", *PACKAGES, *_LIBRARIES], folder)
            for package in sorted(Path(folder).glob("*.deb")):
                _run(["dpkg", "-x", package.name, str(prefix.resolve())], folder)
    except FileNotFoundError as error:
        words = f"{error.filename} is not here; this works on Debian and Ubuntu"
        raise ClusterError(words) from None
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"{shlex.join(error.cmd)}: {error.stderr.strip()}") from None
    # Debian tells its Slurm from others by a suffix, which its own start-up scripts hide.
    (prefix / "bin").mkdir(exist_ok=True)
    for program in (prefix / "usr" / "sbin").glob("slurm*-wlm"):
        link = prefix / "bin" / program.name.removesuffix("-wlm")
        link.unlink(missing_ok=True)
        link.symlink_to(program.resolve())


def _run(words: list[str], folder: str) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=300)

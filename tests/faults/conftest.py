"""A warm `mvl` for the fault tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    said: str


class Warm:
    """`mvl` without its seconds of imports; see `tests.faults.server`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        program = [sys.executable, "-m", "tests.faults.server"]
        # Its own mount namespace where that is allowed, so that nothing mounted outlives it.
        apart = ["unshare", "--user", "--map-root-user", "--mount"]
        self.can_mount = _works([*apart, "true"])
        self._process = subprocess.Popen(
            [*(apart if self.can_mount else []), *program],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def mvl(self, *arguments: object, **limits: int) -> Ended:
        """Run one command to its end."""
        words = [str(argument) for argument in arguments]
        return Ended(**self._ask({"mvl": words, "log": str(self._log), "limits": limits}))

    def mount(self, folder: Path, size: int) -> str:
        """Mount or resize a file system of `size` bytes; returns what went wrong, if anything."""
        return str(self._ask({"mount": str(folder), "bytes": size})["error"])

    def digest(self, checkpoint: Path) -> str:
        """The digest of a checkpoint as the server sees it."""
        return str(self._ask({"read": [str(checkpoint)]})["digests"][0])

    def kills(self, data: Path, folder: Path, number: int, seed: int) -> dict[str, Any]:
        """Kill and resume a run so many times; see `tests.faults.killing`."""
        request = {"kills": number, "data": str(data), "folder": str(folder), "seed": seed}
        return self._ask(request)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has ended"
        value = dict(json.loads(answer))
        assert "trouble" not in value, value["trouble"]
        return value


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """One warm `mvl` for all of them."""
    server = Warm(tmp_path_factory.mktemp("warm") / "log")
    yield server
    server.close()

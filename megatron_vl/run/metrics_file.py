"""The file of metrics that gates read, and commands of others that write one.

A command runs without a shell: its text is split into words as a shell would, `{checkpoint}` and
`{results}` in a word are replaced, nothing else is expanded. What it writes is read as
`run.result_files` reads it.
"""

import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_vl.run.atomic import write_text
from megatron_vl.run.result_files import read_results


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Write {"suite.metric": number}, sorted, all at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(sorted(metrics.items())), indent=1) + "\n")


def run_command(
    command: str, checkpoint: Path, reader: str | None, timeout: float
) -> dict[str, float]:
    """Run a command and read the results it leaves.

    Args:
        command: its words; {checkpoint} and {results} are replaced.
        reader: whose form the results have, see `read_results`.
        timeout: seconds it may take.

    Raises:
        ValueError: it names no place for its results, fails, takes too long or writes none.
    """
    words = shlex.split(command)
    if not any("{results}" in word for word in words):
        raise ValueError(
            f"--command {command!r} does not say where its results go; put {{results}} into it"
        )
    with TemporaryDirectory(prefix="mvl-") as folder:
        results = Path(folder) / "results"
        asked = [
            word.replace("{checkpoint}", str(checkpoint)).replace("{results}", str(results))
            for word in words
        ]
        try:
            done = subprocess.run(asked, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{shlex.join(asked)} took longer than {timeout:g} seconds and was ended; give it "
                "more with --timeout"
            ) from error
        if done.returncode:
            raise ValueError(f"{shlex.join(asked)} ended with exit code {done.returncode}")
        return read_results(results, reader)

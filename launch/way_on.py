"""The command that goes on with a run that stands still."""

import shlex

from megatron_vl.run.folder import RunFolder


def resume(run: RunFolder, stage: str | None = None) -> str:
    """Go on with the run as it was planned, from a stage where one is named."""
    return shlex.join(["mvl", "resume", str(run.path), *(["--from", stage] if stage else [])])


def submit_again(run: RunFolder) -> str:
    """Read the recipe's files anew and go on: what follows a change of a stage or node."""
    plan = run.plan()
    site = ["--site", plan["site"]] if plan["site"] != "local" else []
    words = ["mvl", "submit", plan["recipe"], "--run", str(run.path), *site, *plan["overrides"]]
    return shlex.join(words)

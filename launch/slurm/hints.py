"""Why Slurm refuses a script, in the site's words: what was asked, and the nearest valid value.

Slurm names the rule that is broken and neither the value nor the others there are. They are asked
for here, once something has been refused. Where Slurm cannot list them (no accounting, no such
command) only what was asked is said. Costs one command of Slurm for each refusal.
"""

import difflib
import getpass
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Ask = Callable[..., str]
"""Runs one of Slurm's commands; what it printed. Raises ValueError where it fails."""
_MOST_SHOWN = 12
_NOT_THERE = ("drain", "down", "fail", "maint", "unknown")
_MINUTES = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")


@dataclass(frozen=True)
class Refusal:
    """One kind of refusal.

    Attributes:
        words: in Slurm's message, in lower case.
        option: of sbatch that is at fault.
        key: of the site that sets it.
        listing: the command that lists valid values, separated by spaces, commas or lines.
    """

    words: str
    option: str
    key: str
    listing: tuple[str, ...]


_REFUSALS = (
    Refusal("partition", "--partition", "job.partition", ("sinfo", "-h", "-o", "%R")),
    Refusal(
        "account", "--account", "job.account",
        ("sacctmgr", "-nP", "show", "assoc", "user=USER", "format=account"),
    ),
    Refusal("qos", "--qos", "job.qos", ("sacctmgr", "-nP", "show", "qos", "format=name")),
    Refusal("feature", "--constraint", "job.constraint", ("sinfo", "-h", "-o", "%f")),
    Refusal(
        "reservation", "--reservation", "job.reservation",
        ("scontrol", "show", "reservation", "-o"),
    ),
    Refusal("node name", "--exclude", "job.exclude", ("sinfo", "-hN", "-o", "%N")),
)  # fmt: skip


def explain_refusal(said: str, script: str, ask: Ask) -> str:
    """What a person can change about a script that was refused; empty where that is not known.

    Args:
        said: Slurm's words.
        script: the script's text.
        ask: runs one of Slurm's commands.
    """
    asked = _asked(script)
    lowered = said.lower()
    if "time limit" in lowered and "--time" in asked:
        return _about_time(asked, ask)
    if "node configuration" in lowered or "node count" in lowered:
        return _about_nodes(asked, ask)
    for refusal in _REFUSALS:
        if refusal.words in lowered and refusal.option in asked:
            return _about_name(refusal, asked[refusal.option], ask)
    return ""


def time_note(script: str, ask: Ask) -> str:
    """What is said of a job that asks for more time than its partition gives; "" where it does not.

    Most clusters take such a job and never start it. It is a note and no refusal, because a QOS can
    give more than the partition.
    """
    asked = _asked(script)
    limits = _limits(asked, ask)
    if not limits or int(asked["--time"]) <= max(limits.values()):
        return ""
    return f"{_about_time(asked, ask)}. Without a QOS that gives more, the jobs never start"


def _asked(script: str) -> dict[str, str]:
    """The options of a script's header, by name."""
    return dict(re.findall(r"^#SBATCH (--[a-z-]+)=\"?(.*?)\"?$", script, re.MULTILINE))


def _about_name(refusal: Refusal, value: str, ask: Ask) -> str:
    words = [word.replace("USER", getpass.getuser()) for word in refusal.listing]
    listed = _answer(ask, words)
    named = re.findall(r"ReservationName=(\S+)", listed)
    found = named if words[0] == "scontrol" else re.split(r"[\s,]+", listed)
    known = sorted(set(found) - {"", "(null)"})
    value = next((one for one in value.split(",") if one not in known), value)
    told = f"{refusal.key} of the site is {value}"
    if not known:
        return f"{told}, and `{' '.join(words)}` lists none; nearest valid: leave the key out"
    near = difflib.get_close_matches(value, known, 1, 0.0)
    shown = ", ".join(known[:_MOST_SHOWN]) + ", ..." * (len(known) > _MOST_SHOWN)
    return f"{told}; nearest valid: {near[0]} (there are {shown})"


def _about_time(asked: dict[str, str], ask: Ask) -> str:
    """The limit of the partition that was asked for, or of any."""
    limits = _limits(asked, ask)
    told = f"time.limit_minutes of the site is {asked['--time']}"
    if not limits:
        return f"{told}; `sinfo -o '%P %l'` and `sacctmgr show qos` list what is given"
    name, most = max(limits.items(), key=lambda limit: limit[1])
    return f"{told}, the partition {name} gives {most}; nearest valid: {most}"


def _limits(asked: dict[str, str], ask: Ask) -> dict[str, int]:
    """Minutes by partition: of the one that is asked for, or of all; those without end left out."""
    wanted = asked.get("--partition", "")
    limits = {}
    for row in _answer(ask, ["sinfo", "-h", "-o", "%R %l"]).splitlines():
        name, _, limit = row.partition(" ")
        if (minutes := _minutes(limit)) is not None and wanted in ("", name):
            limits[name] = minutes
    return limits


def _about_nodes(asked: dict[str, str], ask: Ask) -> str:
    """What was asked of nodes beside what the partition's nodes have."""
    names = ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--mem")
    wanted = " ".join(f"{name}={asked[name]}" for name in names if name in asked)
    place = ["-p", asked["--partition"]] if "--partition" in asked else []
    rows = _answer(ask, ["sinfo", "-h", *place, "-o", "%D %T nodes of %c cores, %m MB and GPUs %G"])
    there = "; ".join(rows.replace("(null)", "none").splitlines()) or "nothing that sinfo lists"
    down = any(f" {state}" in rows for state in _NOT_THERE)
    why = "; of nodes that are not there `sinfo -R` says why" if down else ""
    return (
        f"asked for {wanted}; there is {there}{why}. nodes.tasks, nodes.gpus, job.cpus_per_task "
        "and job.memory of the site, and the layout's ranks, decide what is asked"
    )


def _minutes(text: str) -> int | None:
    """A limit as sinfo writes it, in minutes; None for one without end."""
    found = _MINUTES.fullmatch(text.strip())
    if found is None:
        return None
    days, hours, minutes = (int(found[name] or 0) for name in ("days", "hours", "minutes"))
    return (days * 24 + hours) * 60 + minutes


def _answer(ask: Ask, words: Sequence[str]) -> str:
    try:
        return ask(*words)
    except ValueError:
        return ""

"""The nodes that a run leaves out: `mvl nodes list`, `exclude` and `readmit`.

A node that the look at a job's nodes found sick stays out of the run's later starts, and so does
one that a person names. Repaired, it is taken in again by a person, with a reason; a node that is
readmitted too early is found sick and put aside again.

Refuses: a run that is not on a cluster, nodes that the cluster does not have, an empty reason, to
readmit a node that is not left out. What the site excludes (`job.exclude`) is its file's to change.
"""

import difflib
import json
import shlex
from argparse import Namespace
from dataclasses import asdict

from launch import exit_codes
from launch.gates import person
from launch.site import load_site
from launch.site_schema import Launcher
from launch.slurm import queue
from launch.slurm.left_out import NODE, LeftOut, left_out
from launch.submission import SITE_FILE
from launch.tables import print_table
from megatron_vl.run.folder import RunError, RunFolder


def main(args: Namespace) -> int:
    """List what a run leaves out, leave more out, or take some in again."""
    run = RunFolder(args.run)
    if run.plan().get("launcher") != Launcher.slurm.name:
        raise RunError(f"{run.path} runs on this machine alone; nodes are a cluster's")
    if args.subcommand == "list":
        return _list(run, as_json=args.json)
    if not args.reason.strip():
        raise RunError("--reason is empty; say why, it goes on record")
    out = left_out(run.journal.read())
    if args.subcommand == "exclude":
        _refuse_unknown(args.nodes)
        event, done = "excluded", "left out of this run's later starts"
    else:
        _refuse_taken_in(run, args.nodes, out)
        event, done = "readmitted", "taken in again by this run's later starts"
    run.journal.append(event, nodes=args.nodes, who=person(), why=args.reason)
    quoted = shlex.quote(str(run.path))
    print(f"{', '.join(args.nodes)}: {done}; it is in the journal")
    print(f"jobs that wait already were sent before that; to send them anew: mvl resume {quoted}")
    return exit_codes.OK


def _list(run: RunFolder, *, as_json: bool) -> int:
    out = list(left_out(run.journal.read()).values())
    site = load_site(str(run.path / SITE_FILE)).job.exclude
    if as_json:
        print(json.dumps({"left_out": [asdict(one) for one in out], "site": site}))
        return exit_codes.OK
    if out:
        rows = [(one.node, one.since[:19], one.by, one.why) for one in out]
        print_table(f"{run.path} leaves out", ("node", "since", "by", "why"), rows, left=4)
        words = ["mvl", "nodes", "readmit", str(run.path), out[0].node, "--reason", "WHY"]
        print(f"to take one in again, once repaired: {shlex.join(words)}")
    else:
        print(f"{run.path} leaves no node out by itself")
    if site:
        print(f"the site's file excludes {', '.join(site)} (job.exclude)")
    return exit_codes.OK


def _refuse_unknown(nodes: list[str]) -> None:
    """Refuse names that the cluster does not know: sbatch would refuse every later job for them."""
    known = sorted(set(queue.command("sinfo", "-h", "-N", "-o", "%N").split()))
    for node in nodes:
        if node not in known or not NODE.fullmatch(node):
            close = difflib.get_close_matches(node, known, 1, 0.0)
            raise RunError(
                f"{node}: the cluster has no node of that name; nearest valid: "
                f"{close[0] if close else 'none'} (`sinfo -N` lists all; one name each, no ranges)"
            )


def _refuse_taken_in(run: RunFolder, nodes: list[str], out: dict[str, LeftOut]) -> None:
    """Refuse to take in what is not left out, or what the site's file leaves out."""
    site = load_site(str(run.path / SITE_FILE)).job.exclude
    for node in nodes:
        if node in out:
            continue
        if node in site:
            raise RunError(
                f"{node}: it is the site's file that excludes it; take it out of job.exclude there "
                f"and submit {run.plan()['recipe']} again"
            )
        raise RunError(f"{node}: this run does not leave it out; it leaves out {_names(out)}")


def _names(out: dict[str, LeftOut]) -> str:
    return ", ".join(out) or "no node"

"""What the looks at a job's nodes come to: which nodes are sick, and whose fault that is.

Refuses to blame nodes for what most of them lack (disk, packages, a driver): that is the site's
setup, and a person's to mend. Memory errors of a GPU are always its own node's. Costs a read of a
small file for each process that looked.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.causes import Cause
from launch.slurm.examine import FOLDER, NodeReport

NODES = "nodes"
"""In the attempt's folder: the names of the job's nodes, one a line."""


@dataclass(frozen=True)
class Verdict:
    """What the reports of a job's nodes come to.

    Attributes:
        sick: why, by node; those to leave out.
        cause: the class of the ending that follows; None when nothing is wrong.
        words: the same for a person.
        all_reduce_gb_s: the measured rate; None where it was not measured.
    """

    sick: dict[str, str]
    cause: Cause | None
    words: str
    all_reduce_gb_s: float | None


def verdict(attempt: Path) -> Verdict | None:
    """What was found in an attempt; None where nobody looked."""
    folder = attempt / FOLDER
    if not folder.is_dir():
        return None
    nodes = (attempt / NODES).read_text(encoding="utf-8").split()
    reports = [
        NodeReport(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    ]
    rate = next((r.all_reduce_gb_s for r in reports if r.all_reduce_gb_s is not None), None)
    local = _local_problems(nodes, reports)
    shared = [node for node in local if not any(r.broken for r in reports if r.node == node)]
    if local and 2 * len(shared) <= len(nodes):
        words = "; ".join(f"{node}: {why}" for node, why in local.items())
        return Verdict(local, Cause.node_lost, f"sick nodes: {words}", rate)
    if local:
        why = local[shared[0]]
        words = f"{len(shared)} of {len(nodes)} nodes are not fit, so it is the site's setup: {why}"
        return Verdict({}, Cause.bad_config, words, rate)
    slow = next((report.slow for report in reports if report.slow), "")
    if slow:
        return Verdict({}, Cause.node_lost, slow, rate)
    if len(list(folder.glob("*.well"))) < len(reports):
        words = "the nodes are well each by itself, but an all-reduce over them failed"
        return Verdict({}, Cause.node_lost, words, rate)
    return Verdict({}, None, "", rate)


def _local_problems(nodes: Sequence[str], reports: Sequence[NodeReport]) -> dict[str, str]:
    """What is wrong on single nodes: found there, said by nobody there, unlike the others."""
    found: dict[str, str] = {}
    by_node: dict[str, NodeReport] = {}
    for report in reports:
        by_node.setdefault(report.node, report)
        if report.broken or report.problems:
            found[report.node] = "; ".join([*report.broken, *report.problems])
    for node in nodes:
        if node not in by_node:
            found[node] = "no process of the job's first step spoke there"
    common = Counter(json.dumps(report.versions, sort_keys=True) for report in by_node.values())
    if len(common) > 1:
        usual = json.loads(common.most_common(1)[0][0])
        for node, report in by_node.items():
            differs = {k: v for k, v in report.versions.items() if usual.get(k) != v}
            if differs:
                told = ", ".join(f"{k} {v} (others {usual.get(k)})" for k, v in differs.items())
                found.setdefault(node, f"has other versions: {told}")
    return found

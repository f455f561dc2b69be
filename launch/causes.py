"""Why an attempt ended, as one of a few classes that differ in what to do next.

Slurm's own words come first (it knows who took the nodes), then what the ranks said, then the
signals that ended them. What is not recognised is `crashed`: tried once more, then held.
"""

import re
from dataclasses import dataclass
from enum import Enum

from launch import exit_codes
from launch.nodes.errors import CERTIFICATE_FAILED
from launch.reasons import is_echo


class Cause(Enum):
    """A class of endings. The value is its name in journals and post-mortems."""

    time_limit = "time_limit"
    preempted = "preempted"
    node_lost = "node_lost"
    crashed = "crashed"
    stopped = "stopped"
    out_of_memory = "out_of_memory"
    not_finite = "not_finite"
    bad_config = "bad_config"
    bad_data = "bad_data"
    bad_checkpoint = "bad_checkpoint"
    disk_full = "disk_full"
    certificate_failed = "certificate_failed"

    @property
    def is_external(self) -> bool:
        """Whether the cluster ended the attempt, whatever the stage did."""
        return self in (Cause.preempted, Cause.node_lost)


RETRIED = (Cause.time_limit, Cause.preempted, Cause.node_lost, Cause.crashed)
"""Causes with a budget of starts; after the others a person has to look."""


@dataclass(frozen=True)
class Evidence:
    """What is known about an ending.

    Attributes:
        said: the exception of the rank to name; empty when it named none.
        printed: the last lines of every rank.
        slurm: what Slurm and srun wrote about the job and its step.
        killed: a rank was ended by SIGKILL.
        cancelled: a person asked for the end (`mvl cancel`), or Slurm says so.
    """

    said: str = ""
    printed: str = ""
    slurm: str = ""
    killed: bool = False
    cancelled: bool = False


_BY_SLURM = (
    (Cause.preempted, r"DUE TO PREEMPTION|JobState=PREEMPTED|PreemptTime=\d"),
    (Cause.node_lost, r"DUE TO NODE FAILURE|Node failure|JobState=NODE_FAIL|Lost contact"),
    (Cause.time_limit, r"DUE TO TIME LIMIT|JobState=TIMEOUT"),
    (Cause.out_of_memory, r"OUT_OF_MEMORY|oom[-_ ]kill|Out Of Memory|exceeded memory limit"),
)
_BY_RANKS = (
    (Cause.certificate_failed, rf"\A{CERTIFICATE_FAILED}"),
    (
        Cause.out_of_memory,
        r"OutOfMemoryError|out of memory|MemoryError|can't allocate memory|bad_alloc"
        r"|Cannot allocate memory|DefaultCPUAllocator",
    ),
    (
        Cause.disk_full,
        r"No space left on device|Disk quota exceeded|File too large|Errno (28|122|27)\b",
    ),
    (Cause.not_finite, r"NonFiniteLossError"),
    (Cause.bad_checkpoint, r"CheckpointError|CheckpointingException"),
    (Cause.bad_data, r"BadDataError|DataEndedError|ValueError: [^\n]*\(megatron_vl/data/"),
    (Cause.bad_config, r"ConfigError|RunError|ReceiptError|ParentError|ValueError"),
    (Cause.bad_config, rf"\A`mvl [^`]*` exited with status {exit_codes.USAGE}:"),
)
_ADVICE = {
    Cause.time_limit: "Look whether a save fits into the time: raise time.limit_minutes of the "
    "site, or save more often (checkpoint.every).",
    Cause.preempted: "Ask for a partition or QOS that is preempted less, or save more often "
    "(checkpoint.every), so that each start gets further.",
    Cause.node_lost: "Look at the nodes named above (sinfo -R), leave a sick one out with "
    "`mvl nodes exclude`, then resume.",
    Cause.crashed: "Read the last lines. The same error at the same step on other nodes is a "
    "defect; at another step on one node, the node's: leave it out with `mvl nodes exclude`.",
    Cause.stopped: "Nothing is wrong: it was asked to stop.",
    Cause.out_of_memory: "Lower the memory of a rank: more recompute (recompute.decoder), a "
    "smaller train.loss_chunk, more tensor or context ranks, a shorter data.sequence_length. On "
    "a CPU site look at job.memory too.",
    Cause.not_finite: "Look at the loss and gradient norm before it (mvl report). Lower "
    "optimizer.lr or optimizer.clip_grad, look at the samples named above, or go back to an "
    "earlier checkpoint by moving later ones away.",
    Cause.bad_config: "Repair what the message names, then submit the recipe again with the "
    "change.",
    Cause.bad_data: "Look at the source or sample named above; raise data.max_bad_fraction only "
    "when the loss of those samples is acceptable.",
    Cause.bad_checkpoint: "The checkpoint named above is whole (a damaged one is put aside by "
    "itself) but does not fit: put back the model or layout it was written with, or move it out of "
    "the stage's checkpoints folder; the stage then goes on from the one before it.",
    Cause.disk_full: "Make room (older checkpoints of done stages can go), then resume: "
    "unfinished saves are not used.",
    Cause.certificate_failed: "Nothing was released: the same weights held to the same bounds fail "
    "again. The message says which checks failed and what to do next; docs/release.md explains "
    "each. Change the stage or the node's file.",
}
CHANGED_FILES = (Cause.bad_config, Cause.certificate_failed)
"""Causes after which a file of the recipe is changed, so that it must be submitted again."""


def classify(evidence: Evidence) -> Cause:
    """The class of an ending that left no orderly receipt."""
    for cause, pattern in _BY_SLURM:
        if re.search(pattern, evidence.slurm):
            return cause
    if evidence.cancelled:
        return Cause.stopped
    spoken = "" if is_echo(evidence.said) else evidence.said
    for text in (spoken, "" if spoken else evidence.printed):
        for cause, pattern in _BY_RANKS:
            # Alone, a ValueError in the middle of a log need not be what ended it.
            if re.search(pattern, text) and (text is spoken or cause is not Cause.bad_config):
                return cause
    if evidence.killed:
        return Cause.out_of_memory  # nobody asked: the kernel does so when memory runs out
    if is_echo(evidence.said):
        return Cause.node_lost  # every rank missed another, none says why
    return Cause.crashed


def advice(cause: Cause) -> str:
    """What a person can try."""
    return _ADVICE[cause]

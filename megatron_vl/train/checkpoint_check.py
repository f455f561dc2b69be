"""Which checkpoint a stage goes on from, and what happens to one that is damaged.

Before a checkpoint is loaded its files are compared with the digests in its `state.json`, each rank
taking a share. One that does not match is looked at again, each file by another rank, since a
storage or a node can have a bad moment. If it fails again it is renamed aside, `REASON.txt` in it
says why, the journal and the log tell, and the one before it is used. A checkpoint that is whole
but belongs to another model is not touched: that is for a person to mend.

Costs one read of the checkpoint over all ranks together.
"""

import time
from pathlib import Path

import torch.distributed

from megatron_vl.engine.checkpoint_writer import digest_of
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.train.checkpoint import STATE_FILE, CheckpointError, latest, read_state

QUARANTINE_SUFFIX = ".quarantined"
REASON_FILE = "REASON.txt"
PAUSE_SECONDS = 1.0
"""Between the two looks."""


def usable_checkpoint(run: RunFolder, stage: StageFolder) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a stage, or None, and what was moved aside to get there.

    All ranks call it and get the same answer.
    """
    quarantined: list[str] = []
    while True:
        found = _agreed_latest(stage.checkpoints)
        if found is None:
            return None, quarantined
        problem = damage(found, 0)
        if problem:
            time.sleep(PAUSE_SECONDS)
            problem = damage(found, 1)
        if not problem:
            return found, quarantined
        aside = _free_name(found)
        said = (
            f"{found.name} failed to load twice: {problem}; it is now {aside.name}, "
            "the checkpoint before it is used"
        )
        if torch.distributed.get_rank() == 0:
            found.rename(aside)
            (aside / REASON_FILE).write_text(said + "\n")
            run.journal.append(
                "quarantined", stage=stage.name, attempt=stage.last_attempt(), reason=said
            )
        quarantined.append(said)
        torch.distributed.barrier()


def damage(folder: Path, shift: int) -> str:
    """What is wrong with a checkpoint's files, "" if nothing; the same answer on all ranks.

    Args:
        shift: which rank takes which file: another for another shift.
    """
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    share = (rank + shift * max(1, size // 2)) % size
    try:
        files = read_state(folder).files
    except CheckpointError as error:
        return str(error)
    mine = ""
    for name, digest in sorted(files.items())[share::size]:
        mine = mine or _file_damage(folder / name, digest)
    problems = [""] * size
    torch.distributed.all_gather_object(problems, mine)
    return next(filter(None, problems), "")


def _file_damage(path: Path, digest: str) -> str:
    try:
        found = digest_of(path)
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    if found == digest:
        return ""
    return (
        f"the digest of {path.name} is {found[:12]}..., {STATE_FILE} says {digest[:12]}...: it was "
        "cut short or changed after it was written"
    )


def _agreed_latest(checkpoints: Path) -> Path | None:
    """Rank 0's answer: a file system may show a rename to other nodes late."""
    found: list[Path | None] = [latest(checkpoints)]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _free_name(found: Path) -> Path:
    aside, number = found.with_name(found.name + QUARANTINE_SUFFIX), 1
    while aside.exists():
        number += 1
        aside = found.with_name(f"{found.name}{QUARANTINE_SUFFIX}{number}")
    return aside

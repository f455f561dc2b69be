"""Kills ranks and launchers of a run at random moments, again and again, and resumes it.

    python -m tests.faults.killing DATA_ROOT FOLDER KILLS SEED

trains one small stage undisturbed, then once more with KILLS times `kill -9`: of a rank, of the
launcher, or of all of them as in a power cut. At least half are aimed at a save: they wait until
its folder appears, and then a random part of the time a save takes. Each kill is one line of JSON
on the standard output: who, at which step, and what the folder of the unfinished save then held.
The last line says what is equal to the undisturbed run. A resume that does not train is an error.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
import torch

from megatron_vl.data.ledger import lineage
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import DRAWN
from tests.faults import forked

TINY_MODEL = (
    "model.decoder.pattern=M*-",
    "model.decoder.hidden_size=32",
    "model.decoder.ffn_hidden_size=64",
    "model.decoder.num_attention_heads=2",
    "model.decoder.num_query_groups=1",
    "model.decoder.head_dim=16",
    "model.decoder.mamba_num_heads=4",
    "model.decoder.mamba_head_dim=16",
    "model.decoder.mamba_state_dim=16",
    "model.decoder.mamba_num_groups=2",
    "model.encoder.num_layers=1",
    "model.encoder.hidden_size=32",
    "model.encoder.ffn_hidden_size=64",
    "model.encoder.num_attention_heads=2",
    "model.projector.ffn_hidden_size=64",
)
SETTINGS = (
    "parallel.data=2",
    "train.global_batch=2",
    "data.sequence_length=256",
    "evaluation.every=0",
    "evaluation.batches=1",
    "checkpoint.every=2",
)
PATIENCE_SECONDS = 120.0
"""For a resume to reach its next step or save."""
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Kill:
    """One `kill -9`.

    aimed: at a save or at any moment. who: "rank 0", "launcher", "all". step: the last one done.
    save: name of the unfinished save, empty for none. held: files its folder held, by kind.
    """

    number: int
    aimed: str
    who: str
    step: int
    save: str
    held: str


class Killer:
    """One run that is killed and resumed.

    Args:
        data_root: where the prepared data lies.
        folder: takes the run and its logs.
        steps: steps of the stage.
    """

    def __init__(self, data_root: str, folder: Path, steps: int, seed: int) -> None:
        self.run = RunFolder(folder / "run")
        self.log = folder / "mvl.log"
        folder.mkdir(parents=True)
        overrides = [f"data.root={data_root}", f"train.steps={steps}", *SETTINGS, *TINY_MODEL]
        self._submit = ["submit", str(DRAWN), "--run", str(self.run.path)]
        self._submit += ["--follow", *overrides]
        self._steps = steps
        self._random = random.Random(seed)
        self._launcher: forked.Forked | None = None
        self._left: set[str] = set()  # by saves that were cut off

    @property
    def stage(self) -> StageFolder:
        return self.run.stages()[0]

    def start(self) -> None:
        """`mvl submit` the first time, `mvl resume` from then on."""
        again = self.run.exists()
        arguments = ["resume", str(self.run.path), "--follow"] if again else self._submit
        self._launcher = forked.mvl(arguments, self.log)

    def finish(self) -> None:
        """Let the run come to its end."""
        launcher = self._launcher
        assert launcher is not None
        self._wait_for(lambda: launcher.poll() is not None, "the run to end", 10.0)
        assert launcher.returncode == 0, self._told(f"mvl exited with {launcher.returncode}")

    def kill(self, number: int) -> Kill:
        """Wait for a random moment, kill, and wait until what was killed is gone."""
        launcher, at_save = self._launcher, number % 2 == 0
        assert launcher is not None
        attempt = self._attempt_after(number)
        begun = self._step()
        if at_save:
            self._wait_for(lambda: self._unfinished() is not None, "a save")
            time.sleep(self._random.uniform(0.0, 0.9) * self._save_seconds())
        else:
            wanted = begun + self._random.randrange(3)
            self._wait_for(lambda: self._step() >= wanted, f"step {wanted}")
            time.sleep(self._random.uniform(0.0, 0.15))
        pids = self._rank_pids(attempt)
        who = self._random.choice(
            [*(f"rank {rank}" for rank in range(len(pids))), "launcher", "all"]
        )
        unfinished = self._unfinished()
        held = _kinds(unfinished) if unfinished else ""
        if who != "launcher":
            for pid in pids if who == "all" else [pids[int(who[-1])]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if who in ("launcher", "all"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher.pid, signal.SIGKILL)
        self._wait_for(lambda: launcher.poll() is not None, "the launcher to end")
        forked.reap_orphans()
        self._left = {path.name for path in self.stage.checkpoints.glob("*.partial")}
        name = unfinished.name if unfinished else ""
        return Kill(number, "save" if at_save else "any", who, self._step(), name, held)

    def end_orphans(self) -> None:
        """Wait until ranks whose launcher was killed have left."""
        deadline = time.monotonic() + GRACE_SECONDS
        ranks = [(pid, event["time"]) for event in self._started() for pid in event["pids"]]
        while alive := [pid for pid, told in ranks if _alive(pid, told)]:
            forked.reap_orphans()
            if time.monotonic() > deadline:
                raise AssertionError(self._told(f"processes {alive} outlived their launcher"))
            time.sleep(0.02)

    def _attempt_after(self, kills: int) -> int:
        """Wait until the attempt that follows so many kills has started its ranks."""
        self._wait_for(lambda: len(self._started()) > kills, "the ranks to start")
        return len(self._started()) - 1

    def _started(self) -> list[dict]:  # type: ignore[type-arg]
        return [event for event in self.run.journal.read() if event["event"] == "started"]

    def _rank_pids(self, attempt: int) -> list[int]:
        return list(self._started()[attempt]["pids"])

    def _step(self) -> int:
        lines = lineage(self.stage.path / "data.jsonl") if self.run.exists() else []
        return lines[-1]["step"] if lines else 0

    def _unfinished(self) -> Path | None:
        found = self.stage.checkpoints.glob("*.partial")
        return next((path for path in found if path.name not in self._left), None)

    def _save_seconds(self) -> float:
        seconds = [e["seconds"] for e in self.run.journal.read() if e["event"] == "saved"]
        return max(seconds[-3:], default=0.2)

    def _wait_for(self, seen: Callable[[], bool], what: str, times: float = 1.0) -> None:
        launcher = self._launcher
        assert launcher is not None
        deadline = time.monotonic() + PATIENCE_SECONDS * times
        while not seen():
            if launcher.poll() is not None and not seen():
                raise AssertionError(self._told(f"mvl ended before {what}: {launcher.returncode}"))
            if time.monotonic() > deadline:
                raise AssertionError(self._told(f"waited in vain for {what}"))
            time.sleep(0.002)

    def _told(self, problem: str) -> str:
        return f"{problem}\n{self.log.read_text()[-4000:]}"


def _kinds(folder: Path) -> str:
    """What an unfinished save had come to."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "state.json" in names:
        return "complete, not yet renamed"
    if ".metadata" in names:
        return "all ranks' files and the index"
    files = len([name for name in names if name.endswith(".distcp")])
    return f"{files} ranks' files" if files else "planned, nothing written"


def _alive(pid: int, told: str) -> bool:
    """Whether the process that the journal told of is there: its number may be another's by now.

    Args:
        told: when the journal said so, in whole seconds.
    """
    try:
        began = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    return began < datetime.fromisoformat(told).timestamp() + 1.0


def compare(one: Killer, other: Killer) -> dict[str, object]:
    """What is bitwise equal at the end of two runs."""
    first, second = (
        full_tensors(killer.stage.checkpoints / f"step_{killer._steps:06d}", optimizer=True)
        for killer in (one, other)
    )
    losses, ledgers = (
        [read(killer.stage) for killer in (one, other)] for read in (_last_losses, _batches)
    )
    return {
        "tensors": len(first),
        "equal_tensors": sum(torch.equal(t, second[name]) for name, t in first.items()),
        "same_names": first.keys() == second.keys(),
        "steps": len(losses[0]),
        "equal_losses": losses[0] == losses[1],
        "equal_batches": ledgers[0] == ledgers[1],
        "attempts": other.stage.last_attempt(),
        "steps_run": other.stage.metrics_path.read_text().count('"lr": '),
    }


def _last_losses(stage: StageFolder) -> list[tuple[int, float, float]]:
    lines = step_lines(read_metrics(stage.metrics_path))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def _batches(stage: StageFolder) -> list[str]:
    return [line["ids"] for line in lineage(stage.path / "data.jsonl")]


def kill_and_compare(
    data_root: str, folder: Path, kills: int, seed: int, say: Callable[[str], None]
) -> tuple[list[Kill], dict[str, object]]:
    """Run the undisturbed and the disturbed run.

    Args:
        folder: takes both runs; must not exist.
        say: gets a line of JSON for each kill as it falls.

    Returns:
        The kills, and what is equal at the end.
    """
    steps = 12 + 3 * kills // 2  # enough that no run ends before its last kill
    straight = Killer(data_root, folder / "straight", steps, seed)
    disturbed = Killer(data_root, folder / "disturbed", steps, seed)
    began = time.monotonic()
    straight.start()
    straight.finish()
    middle, made = time.monotonic(), []
    for number in range(kills):
        disturbed.start()
        made.append(disturbed.kill(number))
        say(json.dumps(asdict(made[-1])))
    disturbed.start()
    disturbed.finish()
    disturbed.end_orphans()
    seconds = {"straight_s": middle - began, "disturbed_s": time.monotonic() - middle}
    return made, compare(straight, disturbed) | seconds


def main(data_root: str, folder: Path, kills: int, seed: int) -> None:
    """The command; see the module."""
    forked.become_template()
    _, found = kill_and_compare(
        data_root, folder, kills, seed, lambda line: print(line, flush=True)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

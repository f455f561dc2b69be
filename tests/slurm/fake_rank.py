"""Stands where a rank of the trainer would: steps, saves, receipts and signals, without torch.

The weights are a chain of hashes over the steps taken, so a step left out or taken twice shows in
the last one. RUN/faults.json says what goes wrong: {stage: {attempt: {"step": N, "do": WHAT}}};
"hang" takes that step only when somebody has asked the rank to stop.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder, StageFolder, require_done_parent
from megatron_vl.run.metrics import STEP_KEYS, append_metrics
from megatron_vl.run.receipt import CheckpointRef, ParentRef, Receipt, Seconds, now
from megatron_vl.run.stop import Stop, StopRequest


class NonFiniteLossError(RuntimeError):
    """As the trainer's."""


def main(run_path: str, stage_name: str, pace: str) -> None:
    stop = StopRequest.from_environment()
    stop.listen()
    run = RunFolder(run_path)
    stage = run.stage(stage_name)
    rank, attempt = int(os.environ["SLURM_PROCID"]), int(os.environ["MVL_ATTEMPT"])
    entry = next(e for e in run.plan()["stages"] if e["name"] == stage.name)
    fault = faults(run).get(stage.name, {}).get(str(attempt), {})
    print(f"rank {rank} of {os.environ['SLURM_STEP_NUM_TASKS']} at {os.environ['MASTER_ADDR']}")
    print("environment", json.dumps({k: v for k, v in os.environ.items() if k.startswith("T_")}))
    step, weights = latest(run, stage)
    parent = run.parent(stage)
    before = require_done_parent(run, stage, digest=None) if parent else None
    asked = Stop.none
    while step < entry["steps"]:
        time.sleep(float(pace))
        asked = agree(stage, attempt, f"{step}.asked", rank, stop.look(None, 0.0))
        if asked is not Stop.none:
            break
        if fault.get("step") == step + 1 and fault.get("rank", 1) == rank:
            if fault["do"] == "hang":
                while stop.look(None, 0.0) is Stop.none:
                    time.sleep(0.02)
            else:
                if fault["do"] != "deaf":
                    (stage.attempt_path(attempt) / "agree" / "gone").touch()
                fail(fault["do"], stage)
        agree(stage, attempt, f"{step}.gradient", rank, Stop.none)
        step += 1
        weights = hashlib.sha256(f"{weights}{stage.name}{step}".encode()).hexdigest()
        if rank == 0:
            measured = dict.fromkeys(STEP_KEYS, 1.0) | {"step": step, "seconds": float(pace)}
            append_metrics(stage.metrics_path, measured)
            if step % fault.get("every", 2) == 0:
                save(run, stage, step, weights, attempt)
    if rank:
        return
    folder = save(run, stage, step, weights, attempt)
    done = step == entry["steps"]
    saved = CheckpointRef(str(folder.relative_to(stage.path)), checkpoint_digest(folder))
    started_from = None
    if before is not None:
        assert before.checkpoint is not None
        started_from = ParentRef(before.stage, before.checkpoint.digest)
    stage.require_current(attempt)
    stage.write_receipt(
        Receipt(
            run=run.name, stage=stage.name, status="done" if done else "incomplete",
            reason="all steps ran" if done else f"{asked.words}; stopped after {step}",
            step=step, attempts=attempt, checkpoint=saved if done else None, parent=started_from,
            config_hash=entry["config_hash"], data_cursor=step, trainable=["decoder"],
            started=now(), ended=now(), seconds=Seconds(useful=1.0),
        )
    )  # fmt: skip


def agree(stage: StageFolder, attempt: int, what: str, rank: int, asked: Stop) -> Stop:
    """An all-reduce over files: the largest request, the same on every rank."""
    folder = stage.attempt_path(attempt) / "agree"
    folder.mkdir(exist_ok=True)
    own = folder / f"{what}.{rank}"
    own.with_suffix(f".{rank}.new").write_text(str(int(asked)))
    own.with_suffix(f".{rank}.new").rename(own)
    others = [folder / f"{what}.{r}" for r in range(int(os.environ["SLURM_STEP_NUM_TASKS"]))]
    for _ in range(20000):
        if all(path.exists() for path in others):
            return Stop(max(int(path.read_text()) for path in others))
        time.sleep(0.01)
        if own.with_name("gone").exists():
            time.sleep(0.5)  # torch takes longer to notice and to end
            raise RuntimeError("Connection closed by peer")
    raise RuntimeError("Connection closed by peer")


def faults(run: RunFolder) -> dict:
    path = run.path / "faults.json"
    return json.loads(path.read_text()) if path.exists() else {}


def fail(what: str, stage: StageFolder) -> None:
    if what == "crash":
        raise RuntimeError("the rank is broken")
    if what == "nan":
        raise NonFiniteLossError("the loss is nan; first samples of this rank's packs: a, b")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
        bytearray(1 << 30)
    if what == "disk":  # in the middle of a save
        partial = stage.checkpoints / "step_000003.partial"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "weights").symlink_to("/dev/full")
        (partial / "weights").write_text("a beginning")
    if what == "oom":  # what slurmstepd writes where it watches memory; the rank says nothing
        with (stage.path / f"slurm-{os.environ['SLURM_JOB_ID']}.out").open("a") as log:
            log.write("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the ")
            log.write("step tasks have been OOM Killed.\n")
        os._exit(1)
    if what == "deaf":
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    raise ValueError(f"faults.json: no fault {what!r}")


def latest(run: RunFolder, stage: StageFolder) -> tuple[int, str]:
    found = sorted(stage.checkpoints.glob("step_??????/weights"))
    if found:
        return int(found[-1].parent.name.removeprefix("step_")), found[-1].read_text()
    parent = run.parent(stage)
    receipt = parent.receipt() if parent else None
    if parent is None or receipt is None:
        return 0, ""
    return 0, (parent.checkpoint_path(receipt) / "weights").read_text()


def save(run: RunFolder, stage: StageFolder, step: int, weights: str, attempt: int) -> Path:
    folder = stage.checkpoints / f"step_{step:06d}"
    stage.require_current(attempt)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "weights").write_text(weights)
        partial.rename(folder)
        run.journal.append("saved", stage=stage.name, attempt=attempt, step=step, seconds=0.01)
    return folder


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main(*sys.argv[1:])

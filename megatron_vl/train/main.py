"""What each rank of a stage runs: `mvl train CONFIG --run DIR`.

Joins the world, puts the starting weights in place, trains, evaluates, saves, and last of all
writes the `done` receipt. Asked to stop (`run.stop`), all ranks save after the same step and leave
an `incomplete` one. A rank that raises leaves no receipt; whoever launched it writes a `failed` one
with what the rank said.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed

from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.flops import PackFlops, pack_flops
from megatron_vl.cost.recompute import recomputed_layers
from megatron_vl.data.pack import Pack
from megatron_vl.engine import process_groups
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.goodput import goodput
from megatron_vl.run.metrics import append_metrics
from megatron_vl.run.receipt import CheckpointRef, Receipt, Seconds, Status, now
from megatron_vl.run.stop import Stop, StopRequest
from megatron_vl.run.versions import versions
from megatron_vl.train.checkpoint import step_folder
from megatron_vl.train.data_account import TrainingData
from megatron_vl.train.distill import calibrated_inputs, held_out_divergence
from megatron_vl.train.drift import DriftMeter
from megatron_vl.train.evaluate_sets import HeldOutLoss, evaluate_set, held_out_sets
from megatron_vl.train.loss import sum_over_ranks
from megatron_vl.train.meters import Meters, StepMetrics, utilisation
from megatron_vl.train.saves import Saves
from megatron_vl.train.schedule import learning_rate
from megatron_vl.train.start import Start, start_stage
from megatron_vl.train.step import StepResult, count, train_step
from megatron_vl.train.timers import ScheduleTimers, bubble


@dataclass
class Clock:
    """Where a stage's wall time goes, in seconds."""

    born: float = field(default_factory=time.perf_counter)
    useful: float = 0.0
    waiting: float = 0.0

    def receipt(self, before: Seconds) -> Seconds:
        """Steps are useful, data is waiting, the rest (start, saves) is lost.

        Args:
            before: what the attempts before this one took.
        """
        lost = time.perf_counter() - self.born - self.useful - self.waiting
        return Seconds(
            useful=round(before.useful + self.useful, 3),
            waiting=round(before.waiting + self.waiting, 3),
            lost=round(before.lost + lost, 3),
        )


def train_stage(
    config: StageConfig,
    run: RunFolder,
    stage: StageFolder,
    attempt: int,
    stop: StopRequest | None = None,
) -> Status:
    """Run one stage on this rank, to its end or until it is asked to stop.

    Args:
        config: the resolved stage.
        run, stage: where everything is written.
        attempt: number of this attempt, from 1.
        stop: where requests to stop arrive; None when nobody asks.

    Returns:
        The status of the receipt: done or incomplete. Everything else is raised.
    """
    clock, started = Clock(), now()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    process_groups.join_world()
    try:
        groups = process_groups.create(config.parallel, config.train.seed)
        start = start_stage(config, run, stage, groups)
        loop = Loop(config, run, stage, start, clock, stop)
        asked = loop.run(attempt)
        if asked is Stop.none:
            loop.finish(attempt, started)
        else:
            loop.leave(attempt, started, asked)
    finally:
        process_groups.leave_world()
    return "done" if asked is Stop.none else "incomplete"


class Loop:
    """The steps of one stage on one rank."""

    def __init__(
        self,
        config: StageConfig,
        run: RunFolder,
        stage: StageFolder,
        start: Start,
        clock: Clock,
        stop: StopRequest | None = None,
    ) -> None:
        self.config = config
        self.run_folder = run
        self.stage = stage
        self.start = start
        self.trainee = start.trainee
        self.clock = clock
        self.stop = stop or StopRequest()
        self.step_seconds = 0.0
        self.step = start.step
        self.last_result: StepResult | None = None
        self.evaluations: dict[str, float] = {}
        self.speaks = torch.distributed.get_rank() == 0
        self.meters = Meters(stage, config.train.steps, self.speaks)
        self.timers = ScheduleTimers()
        self.trainee.module.config.timers = self.timers
        self.saves_told = 0.0
        self.drift = DriftMeter(config, self.trainee)
        self.loader = TrainingData(
            config,
            stage,
            self.trainee.groups,
            step=start.step,
            cursor=start.data_cursor,
            say=self.meters.say,
        )
        self.saves = Saves(config, run, stage, start, self.loader, self.meters)
        self.trainable_names = {part.value for part in config.train.trainable}

    def run(self, attempt: int) -> Stop:
        """Train to the last step, evaluating (before the first step too) and saving on the way.

        Returns:
            Stop.none at the end; otherwise what the ranks were asked, all of them at this step.
        """
        self._say_what_learns()
        if self.step == 0 and self._agreed() is Stop.none:
            self._evaluate()
        while self.step < self.config.train.steps:
            asked = self._agreed()
            if asked is not Stop.none:
                return asked
            self._one_step()
            if self._due(self.config.evaluation.every):
                self._evaluate()
            if self._due(self.config.checkpoint.every):
                self.saves.begin(self.step, optimizer=True, attempt=attempt)
        return Stop.none

    def _agreed(self) -> Stop:
        """What any rank has been asked, the same answer on all of them.

        In the same message the ranks tell whether they still write; when none does, the save that
        is under way is completed.
        """
        seen = self.stop.look(self.saves.longest, self.step_seconds)
        largest = torch.tensor([int(seen), int(self.saves.writing)], device=PLATFORM.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        asked, writing = largest.tolist()
        if not writing:
            self.saves.end()
        return Stop(asked)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.train.steps

    def _say_what_learns(self) -> None:
        self.meters.say(self.start.said)
        counts = self.trainee.trainable
        total = sum(parameter.numel() for parameter in self.trainee.module.parameters())
        learns = ", ".join(f"{part.value} {n:,}" for part, n in counts.items()) or "nothing"
        self.meters.say(f"trains {learns} of {total:,} parameters on this rank")

    def _one_step(self) -> None:
        began = time.perf_counter()
        packs = self.loader.next_batch()
        counts = count(packs, self.trainee, self._flops(packs))
        loaded = time.perf_counter()
        rate = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        self.timers.restart()
        with self.drift.watching(self.step + 1):
            result = train_step(packs, counts, self.trainee, self.config, rate)
        self.step += 1
        self.loader.used(self.step)
        ended = time.perf_counter()
        self.clock.waiting += loaded - began
        self.clock.useful += ended - loaded
        self.last_result = result
        seconds = ended - began
        self.step_seconds = max(seconds, 0.9 * self.step_seconds)
        rank_tflops, rank_hardware = (
            flops / seconds / 1e12 / torch.distributed.get_world_size()
            for flops in (counts.flops, counts.hardware_flops)
        )
        self.meters.step(
            StepMetrics(
                step=self.step,
                loss=result.loss,
                lr=rate,
                grad_norm=result.grad_norm,
                tokens=counts.tokens,
                samples=counts.samples,
                tokens_per_s=counts.tokens / seconds,
                tflops=rank_tflops,
                mfu=utilisation(rank_tflops, self.config.train.peak_tflops),
                hfu=utilisation(rank_hardware, self.config.train.peak_tflops),
                seconds=seconds,
                data_wait_s=loaded - began,
                save_stall_s=self.saves.waited - self.saves_told,
                bubble=self._bubble(),
            )
        )
        self.saves_told = self.saves.waited
        self._tell_drift()

    def _bubble(self) -> float | None:
        """Of the step's pipeline schedule, over all ranks; None without a pipeline."""
        if self.trainee.groups.pp.size() == 1:
            return None
        world = torch.distributed.group.WORLD
        assert world is not None
        return bubble(*sum_over_ranks([*self.timers.take()], world))

    def _tell_drift(self) -> None:
        report = self.drift.report(self.step)
        if report is not None and self.speaks:
            append_metrics(self.stage.metrics_path, report.record())
            self.meters.say(report.spoken(self.config.fp8.keep_bf16))

    def _flops(self, packs: list[Pack]) -> PackFlops:
        """FLOPs of a step on this rank's packs; padding counts as run, not as asked for."""
        config = self.config
        recomputed = recomputed_layers(config.model, config.parallel, config.recompute)
        total = PackFlops()
        for pack in packs:
            useful, run = (
                pack_flops(
                    config.model,
                    document_lengths=pack.document_lengths,
                    padded_length=length,
                    grids=pack.grids,
                    trainable=self.trainable_names,
                    recomputed=recomputed,
                )
                for length in (sum(pack.document_lengths), pack.tokens_L.shape[0])
            )
            beyond = run.hardware - useful.total
            taught = useful.forward if self.trainee.distillation is not None else 0
            total += PackFlops(useful.forward + taught, useful.backward, beyond)
        return total

    def _evaluate(self) -> None:
        """Held-out loss over the first batches of the stage's own blend, the same every time."""
        self._evaluate_on("val", self.config, self.config.evaluation.batches)
        if self.trainee.distillation is not None:
            began = time.perf_counter()
            found = HeldOutLoss(held_out_divergence(self.trainee, self.config))
            self._tell("val_divergence", found, began)

    def _evaluate_on(self, name: str, config: StageConfig, batches: int) -> None:
        began = time.perf_counter()
        self._tell(name, evaluate_set(config, self.trainee, batches), began)

    def _tell(self, name: str, found: HeldOutLoss, began: float) -> None:
        seconds = time.perf_counter() - began
        self.evaluations |= found.metrics(name)
        self.meters.evaluation(name, self.step, found, seconds)
        self.clock.useful += seconds

    def _evaluate_all_sets(self) -> None:
        """Held-out loss on the set of every stage of the run."""
        if self.config.evaluation.packs:
            for name, config in held_out_sets(self.run_folder, self.config).items():
                self._evaluate_on(name, config, 1)

    def finish(self, attempt: int, started: str) -> None:
        """Evaluate, save, and write the receipt: in this order, the receipt last."""
        self._evaluate()
        self._evaluate_all_sets()
        folder = step_folder(self.stage.checkpoints, self.step)
        optimizer = self.config.checkpoint.optimizer
        self.saves.begin(self.step, optimizer=optimizer, attempt=attempt, last=True)
        self.saves.end()
        self._close()
        calibration = calibrated_inputs(self.trainee)
        if not self.speaks:
            return
        saved = CheckpointRef(
            path=str(folder.relative_to(self.stage.path)), digest=checkpoint_digest(folder)
        )
        if calibration is not None:
            calibration.write(self.stage.path, saved.digest, self.config.train.seed)
        self._write_receipt(attempt, started, "done", f"all {self.step} steps ran", saved)

    def leave(self, attempt: int, started: str, asked: Stop) -> None:
        """Save what the stage has learned since its last save, and write an incomplete receipt."""
        if self.step > self.start.step:
            self.saves.begin(self.step, optimizer=True, attempt=attempt)
            self.saves.end()
        self._close()
        if self.speaks:
            reason = f"{asked.words}; stopped after step {self.step} of {self.config.train.steps}"
            self._write_receipt(attempt, started, "incomplete", reason, None)

    def _close(self) -> None:
        self.loader.close()
        self.meters.close()

    def _write_receipt(
        self, attempt: int, started: str, status: Status, reason: str, saved: CheckpointRef | None
    ) -> None:
        metrics: dict[str, object] = {**self.evaluations}
        metrics["goodput"] = round(goodput(self.run_folder, self.stage, started), 4)
        metrics["save_stall_s"] = round(self.saves.waited, 3)
        if self.last_result is not None:
            metrics |= {"loss": self.last_result.loss, "grad_norm": self.last_result.grad_norm}
        metrics |= self.loader.facts()
        self.stage.require_current(attempt)
        self.stage.write_receipt(
            Receipt(
                run=self.run_folder.name,
                stage=self.stage.name,
                status=status,
                reason=reason,
                step=self.step,
                attempts=attempt,
                checkpoint=saved,
                parent=self.start.parent,
                config_hash=config_hash(self.config),
                data_cursor=self.loader.cursor,
                trainable=sorted(self.trainable_names),
                metrics=metrics,
                seconds=self.clock.receipt(self.stage.seconds_before(attempt)),
                versions=versions(),
                started=started,
                ended=now(),
            )
        )

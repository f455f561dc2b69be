"""What each rank of a stage runs: `mvl train CONFIG --run DIR`.

Joins the world, puts the starting weights in place, trains, evaluates, saves, and last of all
writes the `done` receipt. A rank that raises leaves no receipt; whoever launched it writes a
`failed` one with what the rank said.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed

from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.flops import pack_flops
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.engine import process_groups
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import CheckpointRef, Receipt, Seconds, now
from megatron_vl.run.versions import versions
from megatron_vl.train.checkpoint import LoopState, save, step_folder
from megatron_vl.train.meters import Meters, StepMetrics
from megatron_vl.train.schedule import learning_rate
from megatron_vl.train.start import Start, start_stage
from megatron_vl.train.step import StepResult, count, evaluate_batch, train_step


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


def train_stage(config: StageConfig, run: RunFolder, stage: StageFolder, attempt: int) -> int:
    """Run one stage to its end on this rank.

    Args:
        config: the resolved stage.
        run, stage: where everything is written.
        attempt: number of this attempt, from 1.

    Returns:
        0. Everything else is raised.
    """
    clock, started = Clock(), now()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    process_groups.join_world()
    try:
        groups = process_groups.create(config.parallel, config.train.seed)
        start = start_stage(config, run, stage, groups)
        loop = Loop(config, run, stage, start, clock)
        loop.run(attempt)
        loop.finish(attempt, started)
    finally:
        process_groups.leave_world()
    return 0


class Loop:
    """The steps of one stage on one rank."""

    def __init__(
        self,
        config: StageConfig,
        run: RunFolder,
        stage: StageFolder,
        start: Start,
        clock: Clock,
    ) -> None:
        self.config = config
        self.run_folder = run
        self.stage = stage
        self.start = start
        self.trainee = start.trainee
        self.clock = clock
        self.step = start.step
        self.last_result: StepResult | None = None
        self.evaluations: dict[str, float] = {}
        self.speaks = torch.distributed.get_rank() == 0
        self.meters = Meters(stage, config.train.steps, self.speaks)
        groups = self.trainee.groups
        self.loader = PackLoader(
            config,
            split="train",
            rank=groups.dp.rank(),
            size=groups.dp.size(),
            cursor=start.data_cursor,
        )
        self.trainable_names = {part.value for part in config.train.trainable}

    def run(self, attempt: int) -> None:
        """Train to the last step, evaluating (before the first step too) and saving on the way."""
        self._say_what_learns()
        if self.step == 0:
            self._evaluate()
        while self.step < self.config.train.steps:
            self._one_step()
            if self._due(self.config.evaluation.every):
                self._evaluate()
            if self._due(self.config.checkpoint.every):
                self._save(optimizer=True, attempt=attempt)

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
        result = train_step(packs, counts, self.trainee, self.config, rate)
        self.step += 1
        ended = time.perf_counter()
        self.clock.waiting += loaded - began
        self.clock.useful += ended - loaded
        self.last_result = result
        seconds = ended - began
        self.meters.step(
            StepMetrics(
                step=self.step,
                loss=result.loss,
                lr=rate,
                grad_norm=result.grad_norm,
                tokens=counts.tokens,
                samples=counts.samples,
                tokens_per_s=counts.tokens / seconds,
                tflops=counts.flops / seconds / 1e12 / torch.distributed.get_world_size(),
                # Utilisation needs a declared peak, which a site states; none is guessed here.
                mfu=None,
                seconds=seconds,
            )
        )

    def _flops(self, packs: list[Pack]) -> float:
        """Model FLOPs of a training step on this rank's packs."""
        return math.fsum(
            pack_flops(
                self.config.model,
                document_lengths=pack.cu_seqlens.diff().tolist(),
                padded_length=pack.tokens_L.shape[0],
                num_tiles=pack.tiles_TCHW.shape[0],
                tile_size=self.config.data.tile_size,
                trainable=self.trainable_names,
            ).total
            for pack in packs
        )

    def _evaluate(self) -> None:
        """Held-out loss over the first batches of the stage's own blend, the same every time."""
        began = time.perf_counter()
        groups = self.trainee.groups
        loader = PackLoader(
            self.config, split="val", rank=groups.dp.rank(), size=groups.dp.size(), cursor=0
        )
        try:
            total = weight = 0.0
            for _ in range(self.config.evaluation.batches):
                packs = loader.next_batch()
                counts = count(packs, self.trainee)
                loss = evaluate_batch(packs, counts, self.trainee, self.config)
                total += loss * counts.weight
                weight += counts.weight
        finally:
            loader.close()
        self.evaluations["val"] = total / weight
        self.meters.evaluation("val", self.step, total / weight)
        self.clock.useful += time.perf_counter() - began

    def _save(self, *, optimizer: bool, attempt: int) -> Path:
        """Save and journal; returns the checkpoint's folder."""
        began = time.perf_counter()
        folder = step_folder(self.stage.checkpoints, self.step)
        state = LoopState(
            stage=self.stage.name,
            step=self.step,
            data_cursor=self.loader.cursor,
            optimizer=optimizer,
            trainable=sorted(self.trainable_names),
            parent=self.start.parent.digest if self.start.parent else "",
        )
        save(folder, self.trainee, state)
        if not self.speaks:
            return folder
        seconds = time.perf_counter() - began
        self.meters.say(f"saved {folder.name} in {seconds:.1f} s")
        self.run_folder.journal.append(
            "saved", stage=self.stage.name, attempt=attempt, step=self.step, seconds=seconds
        )
        return folder

    def finish(self, attempt: int, started: str) -> None:
        """Evaluate, save, and write the receipt: in this order, the receipt last."""
        self._evaluate()
        folder = self._save(optimizer=self.config.checkpoint.optimizer, attempt=attempt)
        self.loader.close()
        self.meters.close()
        if not self.speaks:
            return
        metrics: dict[str, object] = {f"eval/{k}": v for k, v in self.evaluations.items()}
        if self.last_result is not None:
            metrics |= {"loss": self.last_result.loss, "grad_norm": self.last_result.grad_norm}
        self.stage.write_receipt(
            Receipt(
                run=self.run_folder.name,
                stage=self.stage.name,
                status="done",
                reason=f"all {self.step} steps ran",
                step=self.step,
                attempts=attempt,
                checkpoint=CheckpointRef(
                    path=str(folder.relative_to(self.stage.path)), digest=checkpoint_digest(folder)
                ),
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

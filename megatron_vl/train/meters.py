"""What a stage says while it trains: `metrics.jsonl`, TensorBoard and a progress line.

Only rank 0 speaks. Losses are written with all their digits, so that runs can be compared bitwise.
"""

import sys
from dataclasses import asdict, dataclass

from torch.utils.tensorboard import SummaryWriter

from megatron_vl.run.folder import StageFolder
from megatron_vl.run.metrics import append_metrics
from megatron_vl.train.evaluate_sets import HeldOutLoss

# Seconds between progress lines in a log; the last step always has one.
PROGRESS_INTERVAL = 2.0


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`: see the field contract in `run.metrics`."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    samples: int
    tokens_per_s: float
    tflops: float
    mfu: float | None
    hfu: float | None
    seconds: float
    data_wait_s: float
    save_stall_s: float
    bubble: float | None


def utilisation(tflops: float, peak_tflops: float) -> float | None:
    """Share of a rank's peak; None where no peak is declared. Both in TFLOP/s of one rank."""
    return tflops / peak_tflops if peak_tflops > 0 else None


class Meters:
    """Writes the measurements of one stage.

    Args:
        stage: whose folder takes them.
        steps: steps the stage runs, for the progress line.
        speaks: this rank is rank 0; the others keep silent.
    """

    def __init__(self, stage: StageFolder, steps: int, speaks: bool) -> None:
        self.stage = stage
        self.steps = steps
        self.speaks = speaks
        self._last_line = 0.0
        self._elapsed = 0.0
        self._board = SummaryWriter(str(stage.tensorboard)) if speaks else None

    def step(self, metrics: StepMetrics) -> None:
        """Record one optimizer step."""
        self._elapsed += metrics.seconds
        if self._board is None:
            return
        append_metrics(self.stage.metrics_path, asdict(metrics))
        for name, value in asdict(metrics).items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, metrics.step)
        last = metrics.step == self.steps
        if last or self._elapsed - self._last_line >= PROGRESS_INTERVAL:
            self._last_line = self._elapsed
            self.say(
                f"step {metrics.step}/{self.steps}  loss {metrics.loss:.4f}  "
                f"lr {metrics.lr:.2e}  grad {metrics.grad_norm:.3f}  "
                f"{metrics.tokens_per_s:,.0f} tokens/s  {metrics.seconds:.2f} s/step"
            )

    def evaluation(self, name: str, step: int, found: HeldOutLoss, seconds: float) -> None:
        """Record the held-out losses of a set and how long they took."""
        if self._board is None:
            return
        record = {"eval": name, "step": step, "seconds": seconds, **asdict(found)}
        append_metrics(self.stage.metrics_path, record)
        for key, loss in found.metrics(name).items():
            self._board.add_scalar(key, loss, step)
        by_source = ", ".join(f"{key} {loss:.3f}" for key, loss in found.sources.items())
        self.say(f"step {step}/{self.steps}  held-out loss ({name}) {found.loss:.4f}: {by_source}")

    def say(self, line: str) -> None:
        """Print a line from rank 0, at once."""
        if self.speaks:
            print(f"[{self.stage.name}] {line}", file=sys.stdout, flush=True)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()

"""The drift meter: which layer FP8 hurts most, measured while training.

Every `fp8.drift_every` steps the first micro-batch of each data-parallel rank gets a BF16 shadow:
each linear in FP8 multiplies the input it was given a second time in BF16, and its outputs are
compared. So an error is the layer's own, not what earlier layers handed on. The shadow changes
nothing: losses are bitwise the same with and without it.

One line a report goes to `metrics.jsonl`:
`{"drift": {layer: {"error", "linear", "input_amax", "weight_amax", "flushed"}}, "step", "keep"}`,
where `keep` is the layer to leave in BF16 first, and a spoken line says what to write. A layer
shows its worst linear: relative L2 error of the output; amax of its input and weight; share of
input values that are not zero and become zero in FP8.

Refuses nothing. Costs, at the steps it runs, a BF16 product and a quantization more for each linear
and two small all-reduces; at others nothing.
"""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.distributed

from megatron_vl.config.schema import StageConfig
from megatron_vl.engine.fp8_linear import Probe
from megatron_vl.engine.fp8_state import Place
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.train.build import Trainee


@dataclass(frozen=True)
class LayerDrift:
    """A layer's worst linear.

    Attributes:
        error: relative L2 error of its output against BF16 from the same input.
        linear: its name inside the layer.
        input_amax, weight_amax: largest magnitudes.
        flushed: share of the input's nonzero values that FP8 rounds to zero.
    """

    error: float
    linear: str
    input_amax: float
    weight_amax: float
    flushed: float


@dataclass(frozen=True)
class DriftReport:
    """One report: layers by name, the worst first."""

    step: int
    layers: dict[str, LayerDrift]

    @property
    def keep(self) -> str:
        """The layer that differs most from BF16."""
        return next(iter(self.layers))

    def record(self) -> dict[str, object]:
        """The line of `metrics.jsonl`."""
        drift = {name: asdict(layer) for name, layer in self.layers.items()}
        return {"drift": drift, "step": self.step, "keep": self.keep}

    def spoken(self, kept: list[str]) -> str:
        """The line for the log.

        Args:
            kept: what `fp8.keep_bf16` names already.
        """
        worst = self.layers[self.keep]
        median = statistics.median(layer.error for layer in self.layers.values())
        return (
            f"drift after step {self.step}: {self.keep} ({worst.linear}) differs most from "
            f"BF16, by {worst.error:.1%} (the median layer {median:.1%}), and {worst.flushed:.1%} "
            "of its input becomes zero; to keep it in BF16 set "
            f"fp8.keep_bf16=[{','.join([*kept, self.keep])}]"
        )


class DriftMeter:
    """Watches one step in so many.

    Args:
        trainee: whose linears are watched; without FP8 there is nothing to do.
    """

    def __init__(self, config: StageConfig, trainee: Trainee) -> None:
        self._every = config.fp8.drift_every
        self._groups = trainee.groups
        self._linears = trainee.fp8.linears if trainee.fp8 is not None else {}
        self._probes: dict[Place, Probe] = {}

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Measure the step that runs inside, if it is one to measure.

        Args:
            step: its number, from 1.
        """
        if self._every == 0 or step % self._every:
            yield
            return
        self._probes = {place: Probe(PLATFORM.device) for place in self._linears}
        for place, linear in self._linears.items():
            linear.probe = self._probes[place]
        try:
            yield
        finally:
            for linear in self._linears.values():
                linear.probe = None

    def report(self, step: int) -> DriftReport | None:
        """What the step showed, the same on every rank; None if it was not measured.

        Every rank calls it: tensor, context and data ranks add up what they saw of a linear,
        pipeline ranks tell each other their layers.
        """
        if self._every == 0 or step % self._every:
            return None
        here = self._reduced()
        stages: list[dict[Place, LayerDrift]] = [{}] * self._groups.pp.size()
        torch.distributed.all_gather_object(stages, here, group=self._groups.pp)
        worst: dict[str, LayerDrift] = {}
        for place, drift in ((p, d) for stage in stages for p, d in stage.items()):
            if place.layer not in worst or not drift.error <= worst[place.layer].error:
                worst[place.layer] = drift
        if not worst:
            return None
        ordered = sorted(worst.items(), key=lambda item: item[1].error, reverse=True)
        return DriftReport(step, dict(ordered))

    def _reduced(self) -> dict[Place, LayerDrift]:
        """This stage's linears, over all ranks that share them; without those unseen."""
        probes, self._probes = self._probes, {}
        if not probes:
            return {}
        sums = torch.stack([probe.sums for probe in probes.values()])
        peaks = torch.stack([probe.peaks for probe in probes.values()])
        for group in (self._groups.tp, self._groups.dp_cp):
            torch.distributed.all_reduce(sums, group=group)
            torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX, group=group)
        found = {}
        rows = zip(probes, sums.tolist(), peaks.tolist(), strict=True)
        for place, (error, reference, flushed, nonzero), (input_amax, weight_amax) in rows:
            if reference > 0:
                found[place] = LayerDrift(
                    error=(error / reference) ** 0.5,
                    linear=place.linear,
                    input_amax=input_amax,
                    weight_amax=weight_amax,
                    flushed=flushed / max(nonzero, 1.0),
                )
        return found

"""Quantization-aware distillation: a fake-quantized student learns its teacher's distribution.

What: the teacher is the stage's starting weights, frozen, at the student's layout. For each global
batch it runs first, forward only, through the same pipeline schedule, and leaves its last hidden
states with the last stage; then the student trains on KL(teacher || student) at the supervised
tokens, weighted and averaged as a loss against labels is. Before the first step, calibration runs
the stage's first batches through the student, not yet quantized, and fixes the scales of its
activations for good.

Why: a release quantized after training loses a little; a few hundred steps of this win most of it
back, and labels are not needed. Parameters stay as they are, so the stage's checkpoint exports like
any other, with the calibration it was trained under (`AMAX_FILE` in the stage's folder).

What it refuses: see `config.check_distill`. What it costs: a second model's weights on each rank
(encoder and projector are shared with the student where the stage freezes them) and its forward
pass; the teacher's last hidden states of a rank's packs; see also `engine.fake_quant` and
`engine.vocab_divergence`.

Source: arXiv 2601.20088; hyper-parameters stand in the recipes' qad_nvfp4.yaml.

Shapes: L sequence (this rank's part under sequence parallelism), B batch, H hidden.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_vl.config.schema import Part, StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.engine.fake_quant import FakeQuantized
from megatron_vl.engine.input_amax import published
from megatron_vl.engine.layer_specs import blocks_for
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.engine.vocab_divergence import Target
from megatron_vl.engine.vocab_loss import Split
from megatron_vl.model.decoder import Head
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import Trainee, build_model
from megatron_vl.train.checkpoint import load_weights
from megatron_vl.train.step import count, evaluate_batch, run_model

AMAX_FILE = "amax.safetensors"


@dataclass(frozen=True)
class Distillation:
    """Teacher and student on this rank.

    Attributes:
        teacher: this rank's pipeline stage of the frozen model.
        student: the trained model's decoder linears.
        temperature: see `config.schema_distill`.
    """

    teacher: VisionLanguageModel
    student: FakeQuantized
    temperature: float

    @torch.no_grad()
    def heads(self, packs: list[Pack], trainee: Trainee, config: StageConfig) -> list[Head | None]:
        """Run the teacher over this rank's packs.

        Returns:
            For each pack what turns the student's hidden states into the divergence of each token;
            None before the last pipeline stage.
        """
        hidden_LBH: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(_teach, trainee=trainee),
            data_iterator=iter(packs),
            model=[self.teacher],
            num_microbatches=len(packs),
            seq_length=config.data.sequence_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self.teacher.post_process:
            return [None] * len(packs)
        weight_VH = self.teacher.language_model.output_layer.weight
        return [Target(each, weight_VH, self.temperature).divergence for each in hidden_LBH]


def _teach(packs: Iterator[Pack], model: nn.Module, *, trainee: Trainee) -> tuple[Tensor, Any]:
    """megatron-core's forward-step protocol, for the teacher's last hidden states."""
    output, _, _ = run_model(next(packs), model, trainee, _states)
    return output, _kept


def _states(hidden_LBH: Tensor, weight_VH: Tensor, split: Split) -> Tensor:
    return hidden_LBH


def _kept(output: Tensor, non_loss_data: bool) -> Tensor:
    return output


def prepare_distillation(trainee: Trainee, config: StageConfig, source: Path | None) -> None:
    """Give a trainee its teacher, where the stage asks for one.

    The student is quantized by `calibrate`, or by `load_calibration` in a stage that goes on.

    Args:
        source: checkpoint of the stage's starting weights.

    Raises:
        CheckpointError: its tensors are not this model's.
    """
    if config.distill.student is StudentFormat.none:
        return
    assert source is not None, "config.check_distill asks for carried weights"
    teacher = build_model(config, trainee.groups, blocks_for(PLATFORM))
    if teacher.pre_process:
        for part, name in ((Part.encoder, "vision_model"), (Part.projector, "vision_projection")):
            if part not in config.train.trainable:
                setattr(teacher, name, getattr(trainee.module, name))
    load_weights(source, teacher, trainee.groups)
    teacher.requires_grad_(False)
    teacher.eval()
    student = FakeQuantized(trainee.module, trainee.groups, config.distill.student)
    trainee.distillation = Distillation(teacher, student, config.distill.temperature)


def calibrate(trainee: Trainee, config: StageConfig, *, cursor: int) -> list[str]:
    """Fix the scales of a student's activations by the stage's first batches, and quantize it.

    Args:
        cursor: where the stage's data begins.

    Returns:
        A line for the log; none where the stage has no teacher.

    Raises:
        ValueError: see `InputAmax.agreed`.
    """
    if trainee.distillation is None:
        return []
    student, dp = trainee.distillation.student, trainee.groups.dp
    recorder, tokens = student.recorder(), 0
    loader = PackLoader(config, split="train", rank=dp.rank(), size=dp.size(), cursor=cursor)
    try:
        with recorder.recording():
            for _ in range(config.distill.calibration_batches):
                packs = loader.next_batch()
                counts = count(packs, trainee)
                evaluate_batch(packs, counts, trainee, config)
                tokens += counts.tokens
    finally:
        loader.close()
    seen = (config.distill.calibration_batches * config.train.global_batch, tokens)
    student.quantize(recorder.agreed(trainee.groups), seen)
    computes = f"the decoder computes in {config.distill.student.value}"
    return [f"calibrated on {seen[0]} packs, {tokens:,} tokens: {computes}"]


@dataclass(frozen=True)
class Calibration:
    """Largest inputs by published name, and the packs and tokens they come from."""

    inputs: dict[str, float]
    packs: int
    tokens: int

    def write(self, folder: Path, digest: str, seed: int) -> None:
        """Write `AMAX_FILE` as an export reads it.

        Args:
            digest: of the checkpoint it belongs to.
            seed: of the plan whose packs were seen.
        """
        said = {"digest": digest, "packs": self.packs, "tokens": self.tokens, "seed": seed}
        unfinished = folder / f"{AMAX_FILE}.partial"
        save_file(
            {name: torch.tensor(value) for name, value in self.inputs.items()},
            unfinished,
            metadata={name: str(value) for name, value in said.items()},
        )
        os.replace(unfinished, folder / AMAX_FILE)


def calibrated_inputs(trainee: Trainee) -> Calibration | None:
    """What a student's activations are quantized by, of all pipeline stages; all ranks call it."""
    if trainee.distillation is None:
        return None
    student = trainee.distillation.student
    return Calibration(published(student.input_amax, trainee.groups), *student.seen)


def held_out_divergence(trainee: Trainee, config: StageConfig) -> float:
    """KL(teacher || student) over the held-out batches of an evaluation, the same every time."""
    dp = trainee.groups.dp
    loader = PackLoader(config, split="val", rank=dp.rank(), size=dp.size(), cursor=0)
    total = weight = 0.0
    try:
        for _ in range(config.evaluation.batches):
            packs = loader.next_batch()
            counts = count(packs, trainee)
            found = evaluate_batch(packs, counts, trainee, config, taught=True)
            total, weight = total + found * counts.weight, weight + counts.weight
    finally:
        loader.close()
    return total / weight

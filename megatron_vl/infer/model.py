"""Opens a checkpoint for inference: one process, one rank, whatever layout wrote it.

A distillation's student is opened as it was trained: its decoder multiplies the numbers a release
of it will hold, by the calibration in its checkpoint. A run stands for its last done stage that is
no such student; a student is opened by its stage folder, or asked for by its format.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import ParallelConfig, StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.data.encode import load_tokenizer
from megatron_vl.data.pack import Pack
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.engine import process_groups
from megatron_vl.engine.fake_quant import FakeQuantized
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.cache import DecodingCache
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.run.folder import RunError, RunFolder
from megatron_vl.sequence.layout import TEXT
from megatron_vl.train.build import build_model
from megatron_vl.train.checkpoint import (
    STATE_FILE,
    latest,
    load_weights,
    restore_calibration,
)


@dataclass(frozen=True)
class OpenModel:
    """A model with its weights in place.

    Attributes:
        config: the stage config it was trained under; of a release, one made of its config files.
        origin: what was opened, in words.
        own_tokenizer: of a release; a checkpoint's lies beside its stage's data.
    """

    module: VisionLanguageModel
    config: StageConfig
    origin: str = ""
    own_tokenizer: Tokenizer | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises FileNotFoundError or ValueError where there is none that fits."""
        return self.own_tokenizer or load_tokenizer(self.config)

    def decoding(self, room: int) -> DecodingCache:
        """A cache for one conversation of at most `room` tokens, answer included."""
        return DecodingCache(self.module, room)

    def known(self, logits_V: Tensor) -> Tensor:
        """Logits (vocab_size,) without the vocabulary's padding rows, which are no tokens."""
        return logits_V[: self.config.model.vocab_size]

    @torch.no_grad()
    def last_logits(self, prompt: Pack, new_tokens: list[int]) -> Tensor:
        """Logits after the last token of one document, float32 on the host, without a cache.

        Runs the whole sequence: the reference that cached decoding is compared with.

        Args:
            prompt: a pack of one document without padding.
            new_tokens: tokens that follow it.

        Returns:
            (vocab_size,); padding rows of the vocabulary are left out.
        """
        device = PLATFORM.device
        visual = visual_input(prompt, device)
        rows_L = F.pad(visual.rows_L, (0, len(new_tokens)), value=TEXT)
        tokens_L = torch.cat([prompt.tokens_L, torch.tensor(new_tokens, dtype=torch.int64)])
        length = tokens_L.shape[0]
        pack = packed_sequence(
            torch.zeros(length, dtype=torch.int32),
            torch.tensor([0, length], dtype=torch.int32),
            length,
            device,
        )
        logits_BLV = self.module(
            tokens_L.to(device).unsqueeze(0), replace(visual, rows_L=rows_L), pack
        )
        return logits_BLV[0, -1, : self.config.model.vocab_size].float().cpu()


def find_checkpoint(path: Path, student: StudentFormat = StudentFormat.none) -> tuple[Path, Path]:
    """The checkpoint folder and the stage config that a path stands for.

    Args:
        path: a run folder, a stage folder of one, or a checkpoint folder. A run stands for its last
            done stage, but for students of distillation, whose weights are for one format.
        student: such students of a run count after all.

    Raises:
        RunError: nothing there is a finished checkpoint.
    """
    asked, path = path, path.resolve()
    run = RunFolder(path)
    if run.exists():
        for stage in reversed(run.stages()):
            receipt = stage.receipt()
            if receipt is None or not receipt.done or receipt.checkpoint is None:
                continue
            if load_stage(stage.config_path).distill.student in (StudentFormat.none, student):
                return stage.checkpoint_path(receipt), stage.config_path
        raise RunError(f"{asked}: no stage of this run is done yet; `mvl status {asked}` shows it")
    for checkpoint, stage_path in (
        (path if (path / STATE_FILE).is_file() else None, path.parent.parent),
        (latest(path / "checkpoints"), path),
    ):
        if checkpoint is not None and (stage_path / "config.yaml").is_file():
            return checkpoint, stage_path / "config.yaml"
    raise RunError(
        f"{asked}: neither a run folder, a stage folder of a run, nor a checkpoint "
        "(runs/NAME/stages/NN_name/checkpoints/step_NNNNNN)"
    )


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[OpenModel]:
    """Load the model a path stands for (see `find_checkpoint`) on this one process."""
    checkpoint, config_path = find_checkpoint(path)
    config = load_stage(config_path)
    origin, student = f"checkpoint {checkpoint} (stage {config.name})", config.distill.student
    with empty_model(config) as (module, groups):
        load_weights(checkpoint, module, groups)
        module.eval()
        if student is not StudentFormat.none:
            restore_calibration(checkpoint, FakeQuantized(module, groups, student))
            origin += f", computing in {student.value} as it was trained"
        yield OpenModel(module, config, origin)


@contextlib.contextmanager
def empty_model(
    config: StageConfig,
) -> Iterator[tuple[VisionLanguageModel, ProcessGroupCollection]]:
    """The model of a stage, whole on this one process, its weights not yet in place.

    Sets the config's layout to that of one rank.
    """
    config.parallel = ParallelConfig()
    with TemporaryDirectory(prefix="mvl-") as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        try:
            groups = process_groups.create(config.parallel, config.train.seed)
            yield build_model(config, groups), groups
        finally:
            process_groups.leave_world()

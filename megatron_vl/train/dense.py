"""Pretrains the laptop's encoder on what each patch shows.

The published recipe starts from a released RADIO encoder, which was distilled from large teachers.
At the laptop's size nobody has released one, and a next-token loss alone teaches a tiny encoder
little in minutes. So it gets a dense target of its own: a linear head on each patch's features
names what stands at two of its points, and its colour (`data/laptop_patches.py`). The head is
thrown away; what remains is an encoder whose features carry letters, digits and textures.

Plain torch AdamW over the model's own encoder, one process: this makes a few committed weights, it
is no second training engine.

Shapes: T tiles, P patches of a tile, E encoder width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_vl.config.schema import OptimizerConfig, Part, StageConfig
from megatron_vl.data import pictures
from megatron_vl.data.laptop_patches import NAMES, POINTS, PatchBatch, draw_patches
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import PART_PREFIXES, VisionLanguageModel
from megatron_vl.sequence.visual import PatchGrid
from megatron_vl.train.schedule import learning_rate


@dataclass(frozen=True)
class DenseSettings:
    """How the encoder is pretrained.

    Attributes:
        steps: optimizer steps.
        tiles: of one step.
        lr: at its peak; warm-up over a twentieth of the steps, cosine to 0.
        weight_decay: of matrices.
        seed: of the tiles; the weights are drawn with the stage's.
        held_out_tiles: tiles the accuracy at the end is measured on.
    """

    steps: int = 3500
    tiles: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 7
    held_out_tiles: int = 512


class PatchHead(nn.Module):
    """Names what each patch shows, from the encoder's features behind a norm without weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(NAMES),) * len(POINTS) + (len(pictures.COLOURS),)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features_PE: Tensor) -> tuple[Tensor, ...]:
        """Scores of the classes at each point, then of the colours, (P, classes) each."""
        normal_PE = F.rms_norm(features_PE, features_PE.shape[-1:])
        return self.linear(normal_PE).split(self.sizes, dim=-1)


def _on_device(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values).to(PLATFORM.device)


def _loss(scores: tuple[Tensor, ...], batch: PatchBatch) -> Tensor:
    """Mean cross-entropy of points and colours."""
    targets = [_on_device(batch.classes_TP2[..., at]).flatten() for at in range(len(POINTS))]
    targets.append(_on_device(batch.colours_TP).flatten())
    losses = [F.cross_entropy(*pair) for pair in zip(scores, targets, strict=True)]
    return torch.stack(losses).mean()


def _accuracy(scores: tuple[Tensor, ...], batch: PatchBatch) -> float:
    """Share of the points that show something, and of which the right thing was said."""
    right = seen = 0
    for at in range(len(POINTS)):
        target = _on_device(batch.classes_TP2[..., at]).flatten()
        shown = target != 0
        right += int(((scores[at].argmax(-1) == target) & shown).sum())
        seen += int(shown.sum())
    return right / max(seen, 1)


def _adamw(trained: nn.Module, settings: DenseSettings) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone, as the stages' optimizer does."""
    matrices = [tensor for tensor in trained.parameters() if tensor.dim() > 1]
    vectors = [tensor for tensor in trained.parameters() if tensor.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))


def pretrain_encoder(
    module: VisionLanguageModel,
    groups: ProcessGroupCollection,
    config: StageConfig,
    settings: DenseSettings,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """Train the encoder of a stage's model, from drawn weights, in a world of one rank.

    Args:
        module: the model of `config`; its weights need not be in place.

    Returns:
        The encoder's tensors by their stored names (`vision_model.*`), float32.
    """
    initialize(module, groups, config.model, config.train.seed)
    encoder = module.vision_model
    torch.manual_seed(settings.seed)
    head = PatchHead(config.model.encoder.hidden_size).to(PLATFORM.device)
    trained = nn.ModuleList([encoder, head])
    optimizer = _adamw(trained, settings)
    schedule = OptimizerConfig(lr=settings.lr, warmup_fraction=0.05)
    sizes = {
        "tile_size": config.data.tile_size,
        "patch_size": config.model.encoder.patch_size,
    }
    edge = sizes["tile_size"] // sizes["patch_size"]

    def scores_of(batch: PatchBatch) -> tuple[Tensor, ...]:
        patches_PF = _on_device(batch.patches_TPF).flatten(0, 1)
        return head(encoder(patches_PF, [PatchGrid(edge, edge)] * len(batch.patches_TPF)))

    draw = Random(f"{settings.seed}/train")
    for step in range(settings.steps):
        batch = draw_patches(draw, "train", settings.tiles, **sizes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, settings.steps)
        loss = _loss(scores_of(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            say(f"encoder: step {step + 1}/{settings.steps}  loss {loss.item():.3f}")
    held_out = draw_patches(Random(f"{settings.seed}/val"), "val", settings.held_out_tiles, **sizes)
    with torch.no_grad():
        scores = scores_of(held_out)
    say(
        f"encoder: held-out loss {_loss(scores, held_out).item():.3f}, "
        f"{_accuracy(scores, held_out):.1%} of what stands in held-out patches named"
    )
    prefix = PART_PREFIXES[Part.encoder]
    return {prefix + name: tensor.detach() for name, tensor in encoder.named_parameters()}

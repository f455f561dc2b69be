"""From encoder patches to decoder tokens: pixel shuffle v2, then RMSNorm, linear, ReLU2, linear.

Shapes: P patches, E encoder width, H decoder width, V visual tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.engine.layer_specs import Blocks, mlp_submodules
from megatron_vl.engine.transformer_configs import projector_config
from megatron_vl.sequence.counts import PIXEL_SHUFFLE
from megatron_vl.sequence.units import pixel_shuffle_index
from megatron_vl.sequence.visual import PatchGrid


def pixel_shuffle(patches_PE: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
    """Fold each 2x2 neighbourhood of patches into one position of four times the width.

    The published v2 order: upper left, upper right, lower left, lower right, in channels (v1 leaves
    rows and columns swapped). Row-major, unit by unit. Grids with odd edges are padded with zeros
    below and on the right.

    Args:
        patches_PE: patches of all units.
        grids: of each unit.

    Returns:
        (V, 4E).
    """
    index_V4 = torch.from_numpy(pixel_shuffle_index(grids)).to(patches_PE.device, non_blocking=True)
    if any(edge % PIXEL_SHUFFLE for grid in set(grids) for edge in grid):
        patches_PE = F.pad(patches_PE, (0, 0, 0, 1))
    return patches_PE.index_select(0, index_V4.flatten()).unflatten(0, (-1, 4)).flatten(1)


def build_projector(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    blocks: Blocks,
    groups: ProcessGroupCollection,
) -> MultimodalProjector:
    """The projector as megatron-core's MultimodalProjector: (V, 1, 4E) in, (V, 1, H) out."""
    return MultimodalProjector(
        projector_config(model, parallel, precision),
        mlp_submodules(blocks),
        "mlp",
        4 * model.encoder.hidden_size,
        tp_group=groups.tp,
    )

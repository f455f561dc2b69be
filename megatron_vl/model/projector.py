"""From encoder patches to decoder tokens: pixel shuffle v2, then RMSNorm, linear, ReLU2, linear.

Shapes: T tiles, G patches along a tile's edge, E encoder width, H decoder width, V visual tokens
(T * (G/2)^2).
"""

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.config.schema import ModelConfig, ParallelConfig, Precision
from megatron_vl.engine.layer_specs import Blocks, mlp_submodules
from megatron_vl.engine.transformer_configs import projector_config


def pixel_shuffle(patches_TGGE: Tensor) -> Tensor:
    """Fold each 2x2 neighbourhood of patches into one position of four times the width.

    The published v2 order: width pairs are folded into channels first, then height pairs, and the
    axes end as they began (v1 leaves them swapped). Row-major.

    Args:
        patches_TGGE: (T, rows, columns, E), rows and columns even.

    Returns:
        (T, rows/2, columns/2, 4E).

    Raises:
        ValueError: an odd number of rows or columns.
    """
    tiles, rows, columns, width = patches_TGGE.shape
    if rows % 2 or columns % 2:
        raise ValueError(
            f"pixel shuffle folds 2x2 patches, the grid is {rows}x{columns}; "
            f"use a tile of {rows + rows % 2}x{columns + columns % 2} patches"
        )
    pairs = patches_TGGE.reshape(tiles, rows // 2, 2, columns // 2, 2 * width)
    return pairs.transpose(2, 3).reshape(tiles, rows // 2, columns // 2, 4 * width)


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

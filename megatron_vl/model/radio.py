"""The RADIO vision encoder over megatron-core's transformer block.

Differs from megatron-core's RADIOViTModel, which fixes one sequence length and draws a random
position window while training: here positions are deterministic, cropped from the top left of the
learned table after resizing it to the grid's longer side, as RADIO does at evaluation (paper facts:
CPE, eval mode). Prefix tokens are prepended for the attention and dropped at the end.

There is no norm after the last layer (RADIO replaces it by the identity).

Shapes: U visual units, P patches of all units, F numbers in a patch (3 * edge * edge), C colour
channels, X pixels of a patch, S tokens (of a unit, or of all in one sequence), B batch (1), E
width, K prefix tokens, R rows of the square position table, G the longer edge of a grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.engine.layer_specs import Blocks, encoder_layer_spec
from megatron_vl.engine.packed import packed_units
from megatron_vl.engine.transformer_configs import encoder_config
from megatron_vl.sequence.visual import PatchGrid

# CLIP's statistics, on a 0..1 scale: the published image processor of the model.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def crop_positions(table_RRE: Tensor, rows: int, columns: int) -> Tensor:
    """Positions of a rows x columns grid of patches.

    The square table is resized bilinearly to the longer side (corners not aligned), then its top
    left window is taken. Deterministic.

    Args:
        table_RRE: learned table, (R, R, E).
        rows, columns: the grid, in patches; at most R each.

    Returns:
        (rows, columns, E).

    Raises:
        ValueError: the grid is larger than the table.
    """
    edge = max(rows, columns)
    if edge > table_RRE.shape[0]:
        raise ValueError(
            f"a grid of {rows}x{columns} patches exceeds the position table of "
            f"{table_RRE.shape[0]}x{table_RRE.shape[0]}; the largest edge is {table_RRE.shape[0]}"
        )
    if edge == table_RRE.shape[0]:
        return table_RRE[:rows, :columns]
    resized_1EGG = F.interpolate(
        table_RRE.permute(2, 0, 1).unsqueeze(0).float(),
        size=(edge, edge),
        mode="bilinear",
        align_corners=False,
    )
    return resized_1EGG[0, :, :rows, :columns].permute(1, 2, 0).to(table_RRE.dtype)


class RadioEncoder(VisionModule):
    """RADIO: patches, positions, prefix tokens, transformer layers.

    Parameter names follow megatron-core's RADIO model: `embedder.weight`, `position_embeddings`,
    `class_token`, `decoder.layers.N...`.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        precision: Precision,
        blocks: Blocks,
        groups: ProcessGroupCollection,
    ) -> None:
        config = encoder_config(model, parallel, precision)
        super().__init__(config=config)
        encoder = model.encoder
        self.position_grid = encoder.position_grid
        self.num_prefix = encoder.num_prefix_tokens
        device = torch.cuda.current_device()
        self.class_token = nn.Parameter(
            torch.empty(
                encoder.num_prefix_tokens,
                encoder.hidden_size,
                device=device,
                dtype=config.params_dtype,
            )
        )
        self.position_embeddings = nn.Parameter(
            torch.empty(
                1,
                encoder.position_grid**2,
                encoder.hidden_size,
                device=device,
                dtype=config.params_dtype,
            )
        )
        self.embedder = ColumnParallelLinear(
            3 * encoder.patch_size**2,
            encoder.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            tp_group=groups.tp,
        )
        self.decoder = TransformerBlock(
            config=config,
            spec=encoder_layer_spec(blocks),
            pre_process=True,
            post_process=False,
            post_layer_norm=False,
            pg_collection=groups,
        )
        pixel_scale = torch.tensor([std * 255 for std in PIXEL_STD], device=device)
        pixel_shift = torch.tensor([mean * 255 for mean in PIXEL_MEAN], device=device)
        # No buffers: a cast of the module to bfloat16 would round them.
        self.pixel_scale_C = pixel_scale
        self.pixel_shift_C = pixel_shift

    def forward(self, patches_PF: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Encode visual units.

        Units of one shape run as a batch; units of several shapes as one long sequence in which
        each attends within itself. Both give the same numbers.

        Args:
            patches_PF: uint8 patches of all units, each flattened as (channel, row, column).
            grids: patches of each unit.

        Returns:
            (P, E), prefix tokens dropped.

        Raises:
            ValueError: a grid is larger than the position table.
        """
        embedded_PE, _ = self.embedder(self._normalised(patches_PF))
        if len(set(grids)) == 1:
            return self._encode_batch(embedded_PE, grids)
        return self._encode_sequence(embedded_PE, grids)

    def _positions(self, grid: PatchGrid) -> Tensor:
        """Positions of one unit's patches, (patches, E)."""
        table_RRE = self.position_embeddings.view(self.position_grid, self.position_grid, -1)
        return crop_positions(table_RRE, grid.rows, grid.columns).flatten(0, 1)

    def _encode_batch(self, embedded_PE: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Units of one shape."""
        embedded_USE = embedded_PE.unflatten(0, (len(grids), -1)) + self._positions(grids[0])
        prefix_UKE = self.class_token.expand(len(grids), -1, -1)
        hidden_SUE = torch.cat([prefix_UKE, embedded_USE], dim=1).transpose(0, 1).contiguous()
        hidden_SUE = self.decoder(hidden_states=hidden_SUE, attention_mask=None)
        return hidden_SUE[self.num_prefix :].transpose(0, 1).flatten(0, 1)

    def _encode_sequence(self, embedded_PE: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Units of any shapes, one after the other, each behind its own prefix tokens."""
        positions = {grid: self._positions(grid) for grid in set(grids)}
        embedded_PE = embedded_PE + torch.cat([positions[grid] for grid in grids])
        pieces = []
        for unit_SE in embedded_PE.split([grid.patches for grid in grids]):
            pieces += [self.class_token, unit_SE]
        lengths = [self.num_prefix + grid.patches for grid in grids]
        pack = packed_units(lengths, embedded_PE.device)
        hidden_SBE = self.decoder(
            hidden_states=torch.cat(pieces).unsqueeze(1),
            attention_mask=None,
            packed_seq_params=pack,
        )
        units = hidden_SBE.squeeze(1).split(lengths)
        return torch.cat([unit_SE[self.num_prefix :] for unit_SE in units])

    def _normalised(self, patches_PF: Tensor) -> Tensor:
        """Patches in the encoder's type, with CLIP's mean and deviation taken out."""
        patches_PCX = patches_PF.unflatten(1, (3, -1)).float()
        normal = (patches_PCX - self.pixel_shift_C.view(-1, 1)) / self.pixel_scale_C.view(-1, 1)
        return normal.flatten(1).to(self.class_token.dtype)

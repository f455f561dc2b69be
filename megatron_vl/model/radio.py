"""The RADIO vision encoder over megatron-core's transformer block.

Differs from megatron-core's RADIOViTModel, which fixes one sequence length and draws a random
position window while training: here positions are deterministic, cropped from the top left of the
learned table after resizing it to the grid's longer side, as RADIO does at evaluation (paper facts:
CPE, eval mode). Prefix tokens are prepended for the attention and dropped at the end.

There is no norm after the last layer (RADIO replaces it by the identity).

Shapes: T tiles, C colour channels, H x W a tile's pixels, P patch edge, G patches along an edge, F
numbers in a patch (3*P*P), S tokens of a tile, E width, K prefix tokens, R rows of the square
position table.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_vl.config.schema import ModelConfig, ParallelConfig, Precision
from megatron_vl.engine.layer_specs import Blocks, encoder_layer_spec
from megatron_vl.engine.transformer_configs import encoder_config

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
        self.patch_size = encoder.patch_size
        self.position_grid = encoder.position_grid
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

    def forward(self, tiles_TCHW: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tiles_TCHW: uint8 RGB tiles (T, 3, H, W), both multiples of the patch edge.

        Returns:
            (T, G, G, E), prefix tokens dropped.

        Raises:
            ValueError: the tile edge is no multiple of the patch edge.
        """
        patches_TGGF = self._patches(tiles_TCHW)
        tiles, rows, columns, _ = patches_TGGF.shape
        embedded_TSE, _ = self.embedder(patches_TGGF.flatten(1, 2))
        table_RRE = self.position_embeddings.view(self.position_grid, self.position_grid, -1)
        embedded_TSE = embedded_TSE + crop_positions(table_RRE, rows, columns).flatten(0, 1)
        prefix_TKE = self.class_token.expand(tiles, -1, -1)
        hidden_TSE = torch.cat([prefix_TKE, embedded_TSE], dim=1)
        hidden_STE = self.decoder(
            hidden_states=hidden_TSE.transpose(0, 1).contiguous(), attention_mask=None
        )
        kept_STE = hidden_STE[self.class_token.shape[0] :]
        return kept_STE.transpose(0, 1).unflatten(1, (rows, columns))

    def _patches(self, tiles_TCHW: Tensor) -> Tensor:
        """Normalised patches, (T, G, G, 3*P*P), each flattened as (channel, row, column)."""
        tiles, channels, height, width = tiles_TCHW.shape
        patch = self.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"tiles of {height}x{width} pixels do not split into patches of {patch}x{patch}; "
                f"the nearest edge is {max(round(height / patch), 1) * patch}"
            )
        shift_C11 = self.pixel_shift_C.view(-1, 1, 1)
        scale_C11 = self.pixel_scale_C.view(-1, 1, 1)
        pixels_TCHW = ((tiles_TCHW.float() - shift_C11) / scale_C11).to(self.class_token.dtype)
        grid = pixels_TCHW.view(
            tiles, channels, height // patch, patch, width // patch, patch
        ).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(tiles, height // patch, width // patch, channels * patch * patch)

"""The vision-language model: RADIO encoder, projector and hybrid decoder, composed.

    tiles -> encoder -> pixel shuffle -> projector --+
                                                     v
    tokens -> embedding ----------> visual positions overwritten -> decoder -> loss or logits

Encoder, projector and embedding live on the first pipeline stage, the output layer on the last.
Where a visual embedding goes is decided on the host when the pack is laid out; the model only
copies rows.

Shapes: L sequence length of the pack, H decoder width, T tiles, C colour channels, V visual
embeddings.
"""

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vl.config.schema import ModelConfig, ParallelConfig, Part, Precision
from megatron_vl.engine.layer_specs import Blocks
from megatron_vl.engine.packed import PackedSequence
from megatron_vl.engine.transformer_configs import decoder_config
from megatron_vl.model.decoder import build_decoder
from megatron_vl.model.projector import build_projector, pixel_shuffle
from megatron_vl.model.radio import RadioEncoder

# Prefixes of the parameter names of each trainable part.
PART_PREFIXES = {
    Part.encoder: "vision_model.",
    Part.projector: "vision_projection.",
    Part.decoder: "language_model.",
}


class VisionLanguageModel(MegatronModule):
    """One pipeline stage of the composed model.

    Args:
        model, parallel, precision: sections of the stage's config.
        blocks: the layer spec's modules, torch or Transformer Engine.
        groups: process groups of the layout.
        sequence_length: length every pack is padded to, in tokens.
        pre_process: first pipeline stage (encoder, projector, embedding).
        post_process: last pipeline stage (final norm, output layer).
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        precision: Precision,
        blocks: Blocks,
        groups: ProcessGroupCollection,
        *,
        sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(config=decoder_config(model, parallel, precision))
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = False
        self.tensor_group = groups.tp
        parts = (model, parallel, precision, blocks, groups)
        if pre_process:
            self.vision_model = RadioEncoder(*parts)
            self.vision_projection = build_projector(*parts)
        self.language_model = build_decoder(
            *parts,
            sequence_length=sequence_length,
            pre_process=pre_process,
            post_process=post_process,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous pipeline stage's output; called by megatron-core's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens_BL: Tensor,
        tiles_TCHW: Tensor,
        visual_positions_V: Tensor,
        pack: PackedSequence,
        labels_BL: Tensor | None = None,
    ) -> Tensor:
        """Run this stage over one pack (B = 1).

        Args:
            tokens_BL: int64 token ids; the image token where a visual embedding goes.
            tiles_TCHW: uint8 tiles; T may be 0.
            visual_positions_V: int64 position in the pack of each visual embedding, tile by tile.
            pack: the documents of the pack.
            labels_BL: int64 next tokens; None asks for logits.

        Returns:
            Last stage: loss of each token (B, L) in float32, or logits (B, L, vocabulary part).
            Other stages: hidden states (L, B, H).
        """
        hidden_LBH = None
        if self.pre_process:
            hidden_LBH = self._embed(tokens_BL, tiles_TCHW, visual_positions_V)
            if self.config.sequence_parallel:
                hidden_LBH = scatter_to_sequence_parallel_region(
                    hidden_LBH, group=self.tensor_group
                )
        return self.language_model(
            input_ids=tokens_BL,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden_LBH,
            labels=labels_BL,
            packed_seq_params=pack,
        )

    def _embed(self, tokens_BL: Tensor, tiles_TCHW: Tensor, visual_positions_V: Tensor) -> Tensor:
        """Token embeddings with visual embeddings in their places, (L, B, H)."""
        text_LBH = self.language_model.embedding(input_ids=tokens_BL, position_ids=None)
        if tiles_TCHW.shape[0] == 0:
            return text_LBH
        visual_VBH = self.encode_tiles(tiles_TCHW)
        return text_LBH.index_copy(0, visual_positions_V, visual_VBH.to(text_LBH.dtype))

    def encode_tiles(self, tiles_TCHW: Tensor) -> Tensor:
        """Visual embeddings (V, 1, H) of uint8 tiles, tile by tile, row-major inside a tile."""
        # A frozen encoder builds no graph: nothing before it learns.
        learns = any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            patches_TGGE = self.vision_model(tiles_TCHW)
            shuffled_VBF = pixel_shuffle(patches_TGGE).flatten(0, 2).unsqueeze(1)
        return self.vision_projection(shuffled_VBF)


def part_of(parameter_name: str) -> Part:
    """The trainable part a parameter belongs to.

    Args:
        parameter_name: dotted name inside `VisionLanguageModel`.

    Raises:
        ValueError: no part owns that name.
    """
    for part, prefix in PART_PREFIXES.items():
        if parameter_name.startswith(prefix):
            return part
    raise ValueError(
        f"parameter {parameter_name!r} belongs to no part; parts are named "
        + ", ".join(PART_PREFIXES.values())
    )

"""The vision-language model: RADIO encoder, projector and hybrid decoder, composed.

    patches -> encoder -> pixel shuffle -> projector -> gathered over context ranks --+
                                                                                      v
    tokens -> this rank's part -> embedding --------> visual places overwritten -> decoder -> loss

Encoder, projector and embedding live on the first pipeline stage, the output layer on the last.
Where a visual embedding goes is decided on the host when the pack is laid out; the model only
copies rows. The exception is a pruned video, whose order is computed here (see `evs.py`).

Shapes: L sequence length of the pack, S this context rank's part of it (L where there is one rank),
H decoder width, P patches, F numbers of a patch, V visual embeddings of all context ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig, Part, Precision, TrainConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.engine.context_parallel import gather
from megatron_vl.engine.layer_specs import Blocks
from megatron_vl.engine.packed import PackedSequence
from megatron_vl.engine.transformer_configs import decoder_config
from megatron_vl.model.decoder import Head, build_decoder
from megatron_vl.model.evs import place_videos
from megatron_vl.model.projector import build_projector, pixel_shuffle
from megatron_vl.model.radio import RadioEncoder
from megatron_vl.model.visual import VisualInput
from megatron_vl.sequence.visual import PatchGrid

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
        loss_chunk: tokens whose logits exist at a time in training.
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
        loss_chunk: int = TrainConfig.loss_chunk,
    ) -> None:
        super().__init__(config=decoder_config(model, parallel, precision))
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = False
        self.tensor_group = groups.tp
        self.context_group = groups.cp
        parts = (model, parallel, precision, blocks, groups)
        if pre_process:
            self.vision_model = RadioEncoder(*parts)
            self.vision_projection = build_projector(*parts)
        self.language_model = build_decoder(
            *parts,
            sequence_length=sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            loss_chunk=loss_chunk,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous pipeline stage's output; called by megatron-core's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens_BL: Tensor,
        visual: VisualInput | None,
        pack: PackedSequence,
        labels_BL: Tensor | None = None,
        head: Head | None = None,
    ) -> Tensor:
        """Run this stage over one pack (B = 1).

        Args:
            tokens_BL: int64 token ids of the whole pack; the image token where a visual embedding
                goes.
            visual: the pictures, and where their embeddings go; needed on the first stage alone.
            pack: the documents of the pack.
            labels_BL: int64 next tokens of this rank's part (B, S); None asks for logits.
            head: what the last stage returns instead, see `HybridDecoder`.

        Returns:
            Last stage: loss of each token (B, S) in float32, or logits (B, S, vocabulary part).
            Other stages: hidden states (S, B, H).
        """
        hidden_LBH = None
        if self.pre_process:
            assert visual is not None
            hidden_LBH = self.embed(tokens_BL, visual, pack)
            if self.config.sequence_parallel:
                hidden_LBH = scatter_to_sequence_parallel_region(
                    hidden_LBH, group=self.tensor_group
                )
        return self.language_model(hidden_LBH, pack, labels_BL, head)

    def embed(self, tokens_BL: Tensor, visual: VisualInput, pack: PackedSequence) -> Tensor:
        """Token embeddings with visual embeddings in their places, (S, B, H)."""
        tokens_L, rows_L = tokens_BL.squeeze(0), visual.rows_L
        if visual.grids:
            visual_VBH = self._gathered_embeddings(visual)
            if visual.videos:
                embeddings_VH = visual_VBH.detach().squeeze(1)
                tokens_L, rows_L = place_videos(tokens_L, rows_L, embeddings_VH, visual.videos)
        tokens_BS = pack.local(tokens_L).unsqueeze(0)
        text_SBH = self.language_model.embedding(input_ids=tokens_BS, position_ids=None)
        if not visual.grids:
            return text_SBH
        rows_S = pack.local(rows_L)
        shown_S = rows_S >= 0
        # Text places read some row and drop it: a different one each, as the gradients of rows that
        # are read many times would queue.
        any_S = torch.arange(rows_S.shape[0], device=rows_S.device) % visual_VBH.shape[0]
        placed_SBH = visual_VBH.index_select(0, torch.where(shown_S, rows_S, any_S))
        return torch.where(shown_S.view(-1, 1, 1), placed_SBH.to(text_SBH.dtype), text_SBH)

    def _gathered_embeddings(self, visual: VisualInput) -> Tensor:
        """Visual embeddings of all context ranks, each rank's padded, (V, 1, H)."""
        own_VBH = self.encode(visual.patches_PF, visual.grids)
        if self.context_group.size() == 1:
            return own_VBH
        missing = visual.padded_tokens - own_VBH.shape[0]
        return gather(F.pad(own_VBH, (0, 0, 0, 0, 0, missing)), self.context_group)

    def encode(self, patches_PF: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Visual embeddings (V, 1, H) of patches, unit by unit, row-major inside a unit.

        A frozen encoder builds no graph: nothing before it learns.
        """
        learns = any(parameter.requires_grad for parameter in self.vision_model.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            encoded_PE = self.vision_model(patches_PF, grids)
            shuffled_VBF = pixel_shuffle(encoded_PE, grids).unsqueeze(1)
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

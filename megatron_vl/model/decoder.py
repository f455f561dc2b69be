"""The hybrid Mamba-2/Transformer decoder: megatron-core's MambaModel, built from the pattern, with
a head that never holds the logits of a whole sequence in training.

Shapes: L sequence (this rank's part between layers under sequence parallelism), B batch, H hidden,
V rows of the output matrix on this rank.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.engine.layer_specs import Blocks, hybrid_decoder_spec
from megatron_vl.engine.transformer_configs import decoder_config
from megatron_vl.engine.vocab_loss import Split, chunked_cross_entropy

Head = Callable[[Tensor, Tensor, Split], Tensor]
"""What the last stage makes of hidden states (L, B, H) and its rows (V, H) of the output matrix."""


class HybridDecoder(MambaModel):
    """One pipeline stage of the decoder.

    Args:
        loss_chunk: tokens whose logits exist at a time in training.
    """

    def __init__(self, *args: Any, loss_chunk: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split = Split(self.pg_collection.tp, self.config.sequence_parallel, loss_chunk)

    def forward(
        self,
        hidden_LBH: Tensor | None,
        pack: PackedSeqParams | None,
        labels_BL: Tensor | None = None,
        head: Head | None = None,
    ) -> Tensor:
        """Run the layers and, on the last stage, the head.

        Args:
            hidden_LBH: embedded tokens; None on a later stage, which takes the input tensor that
                the pipeline schedule has set.
            pack: the documents; None for one document a row.
            labels_BL: int64 next tokens of the whole sequence; None asks for logits.
            head: what the last stage returns instead; then no labels are needed.

        Returns:
            Last stage: loss of each token (B, L) in float32, or logits (B, L, V) of the whole
            sequence. Other stages: hidden states (L, B, H).
        """
        hidden_LBH = self.decoder(
            hidden_states=hidden_LBH, attention_mask=None, packed_seq_params=pack
        )
        if not self.post_process:
            return hidden_LBH
        if head is not None:
            return head(hidden_LBH, self.output_layer.weight, self.split)
        if labels_BL is None:
            logits_LBV, _ = self.output_layer(hidden_LBH)
            return logits_LBV.transpose(0, 1).contiguous()
        return chunked_cross_entropy(hidden_LBH, self.output_layer.weight, labels_BL, self.split)


def build_decoder(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    blocks: Blocks,
    groups: ProcessGroupCollection,
    *,
    sequence_length: int,
    pre_process: bool,
    post_process: bool,
    loss_chunk: int,
) -> HybridDecoder:
    """One pipeline stage of the decoder.

    Args:
        sequence_length: longest sequence it will see, in tokens; there are no position embeddings.
        pre_process: holds the token embedding (first stage).
        post_process: holds the final norm and the output layer (last stage).
        loss_chunk: tokens whose logits exist at a time in training.

    Raises:
        ValueError: the pipeline split would build other layers than the pattern's.
    """
    return HybridDecoder(
        config=decoder_config(model, parallel, precision),
        mamba_stack_spec=hybrid_decoder_spec(blocks, model.decoder.mamba_chunk_size),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        hybrid_override_pattern=model.decoder.pattern,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        # Visual embeddings are placed into the whole sequence before it is split.
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
        loss_chunk=loss_chunk,
    )

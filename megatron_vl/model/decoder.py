"""The hybrid Mamba-2/Transformer decoder: megatron-core's MambaModel, built from the pattern."""

from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import ModelConfig, ParallelConfig, Precision
from megatron_vl.engine.layer_specs import Blocks, hybrid_decoder_spec
from megatron_vl.engine.transformer_configs import decoder_config


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
) -> MambaModel:
    """One pipeline stage of the decoder.

    Args:
        sequence_length: longest sequence it will see, in tokens; there are no position embeddings.
        pre_process: holds the token embedding (first stage).
        post_process: holds the final norm and the output layer (last stage).

    Raises:
        ValueError: the pipeline split would build other layers than the pattern's.
    """
    return MambaModel(
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
    )

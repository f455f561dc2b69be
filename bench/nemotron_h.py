"""transformers' own nemotron_h at a model's sizes, the other side of `bench.train_step` and of
the tests that compare layers, logits and greedy tokens with code nobody here wrote.

One place for the sizes: a key that one of its users forgot would compare two different models.
Refuses nothing; transformers refuses a pattern it cannot build.
"""

import transformers

from megatron_vl.config.schema_model import ModelConfig


def empty_nemotron_h(model: ModelConfig) -> transformers.NemotronHForCausalLM:
    """NemotronHForCausalLM of the sizes of `model`'s decoder, with weights of its own drawing."""
    decoder = model.decoder
    return transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            vocab_size=model.padded_vocab_size,
            hidden_size=decoder.hidden_size,
            hybrid_override_pattern=decoder.pattern,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            head_dim=decoder.head_dim,
            intermediate_size=decoder.ffn_hidden_size,
            ssm_state_size=decoder.mamba_state_dim,
            mamba_num_heads=decoder.mamba_num_heads,
            mamba_head_dim=decoder.mamba_head_dim,
            n_groups=decoder.mamba_num_groups,
            chunk_size=decoder.mamba_chunk_size,
            layer_norm_epsilon=decoder.norm_epsilon,
            # transformers clamps dt from below at this value, whatever time_step_limit says;
            # megatron-core and mamba_ssm do not clamp.
            time_step_min=1e-30,
        )
    )

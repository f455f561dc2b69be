"""transformers' own decoder, holding a model's weights."""

from torch import Tensor, nn

from bench.nemotron_h import empty_nemotron_h
from megatron_vl.config.schema import StageConfig
from megatron_vl.model.vlm import VisionLanguageModel


def split_qkv(fused: Tensor, heads: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of megatron-core's fused projection, stored group by group as queries, key, value."""
    queries = heads // groups
    parts = fused.reshape(groups, (queries + 2) * width, *fused.shape[1:])
    query, key, value = parts.split([queries * width, width, width], dim=1)
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in (query, key, value))  # type: ignore[return-value]


def decoder_weights(model: VisionLanguageModel, config: StageConfig) -> dict[str, Tensor]:
    """Our decoder under transformers' names."""
    ours = model.language_model.state_dict()
    sizes = config.model.decoder
    theirs = {
        "model.embeddings.weight": ours["embedding.word_embeddings.weight"],
        "model.norm_f.weight": ours["decoder.final_norm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer, kind in enumerate(sizes.pattern):
        prefix, name = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        if kind == "M":
            theirs[name + "norm.weight"] = ours[prefix + "mixer.in_proj.layer_norm_weight"]
            for leaf in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D"):
                theirs[f"{name}mixer.{leaf}"] = ours[f"{prefix}mixer.{leaf}"]
            for leaf in ("dt_bias", "norm.weight", "out_proj.weight"):
                theirs[f"{name}mixer.{leaf}"] = ours[f"{prefix}mixer.{leaf}"]
        elif kind == "-":
            theirs[name + "norm.weight"] = ours[prefix + "mlp.linear_fc1.layer_norm_weight"]
            theirs[name + "mixer.up_proj.weight"] = ours[prefix + "mlp.linear_fc1.weight"]
            theirs[name + "mixer.down_proj.weight"] = ours[prefix + "mlp.linear_fc2.weight"]
        else:
            attention = prefix + "self_attention."
            theirs[name + "norm.weight"] = ours[attention + "linear_qkv.layer_norm_weight"]
            qkv = split_qkv(
                ours[attention + "linear_qkv.weight"],
                sizes.num_attention_heads,
                sizes.num_query_groups,
                sizes.head_dim,
            )
            for leaf, weight in zip("qkv", qkv, strict=True):
                theirs[f"{name}mixer.{leaf}_proj.weight"] = weight
            theirs[name + "mixer.o_proj.weight"] = ours[attention + "linear_proj.weight"]
    return theirs


def their_decoder(model: VisionLanguageModel, config: StageConfig) -> nn.Module:
    """NemotronHForCausalLM with our decoder's weights."""
    theirs = empty_nemotron_h(config.model)
    missing, unexpected = theirs.load_state_dict(decoder_weights(model, config), strict=False)
    assert not missing
    assert not unexpected
    return theirs.eval()

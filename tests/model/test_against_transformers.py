"""The encoder, projector and decoder against transformers' own classes, with random weights."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.model.projector import pixel_shuffle
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD
from megatron_vl.model.vlm import VisionLanguageModel

TOLERANCE = 2e-5


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


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


@pytest.fixture(scope="module")
def nemotron_h(model: VisionLanguageModel, config: StageConfig) -> nn.Module:
    sizes = config.model.decoder
    theirs = transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            vocab_size=config.model.padded_vocab_size,
            hidden_size=sizes.hidden_size,
            hybrid_override_pattern=sizes.pattern,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            head_dim=sizes.head_dim,
            intermediate_size=sizes.ffn_hidden_size,
            ssm_state_size=sizes.mamba_state_dim,
            mamba_num_heads=sizes.mamba_num_heads,
            mamba_head_dim=sizes.mamba_head_dim,
            n_groups=sizes.mamba_num_groups,
            chunk_size=sizes.mamba_chunk_size,
            layer_norm_epsilon=sizes.norm_epsilon,
            # transformers clamps dt from below at this value, whatever time_step_limit says;
            # megatron-core and mamba_ssm do not clamp.
            time_step_min=1e-30,
        )
    )
    missing, unexpected = theirs.load_state_dict(decoder_weights(model, config), strict=False)
    assert not missing
    assert not unexpected
    return theirs.eval()


def test_decoder_logits(
    model: VisionLanguageModel, config: StageConfig, nemotron_h: nn.Module
) -> None:
    """Two documents in one pack against each alone in transformers' model."""
    generator = torch.Generator().manual_seed(5)
    lengths = (93, 70)
    documents = [
        torch.randint(0, config.model.vocab_size - 10, (n,), generator=generator) for n in lengths
    ]
    ids = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), torch.tensor(lengths))
    pack = packed_sequence(
        ids, torch.tensor([0, 93, 163], dtype=torch.int32), 93, torch.device("cpu")
    )
    no_tiles = torch.empty((0, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        ours_BLV = model(torch.cat(documents).unsqueeze(0), no_tiles, torch.empty(0).long(), pack)
        theirs = [nemotron_h(document.unsqueeze(0)).logits[0] for document in documents]
    for ours, expected in zip(ours_BLV[0].split(lengths), theirs, strict=True):
        assert relative_error(ours, expected) < TOLERANCE


def encoder_weights(model: VisionLanguageModel, config: StageConfig) -> dict[str, Tensor]:
    """Our encoder under transformers' names."""
    ours = model.vision_model.state_dict()
    sizes = config.model.encoder
    theirs = {
        "embeddings.patch_projection.weight": ours["embedder.weight"],
        "embeddings.position_embedding": ours["position_embeddings"],
        "embeddings.cls_register_token": ours["class_token"],
    }
    width = sizes.hidden_size // sizes.num_attention_heads
    for layer in range(sizes.num_layers):
        prefix = f"decoder.layers.{layer}."
        name = f"encoder.layer.{layer}."
        for leaf in ("weight", "bias"):
            attention, mlp = prefix + "self_attention.", prefix + "mlp."
            theirs[f"{name}norm1.{leaf}"] = ours[f"{attention}linear_qkv.layer_norm_{leaf}"]
            theirs[f"{name}norm2.{leaf}"] = ours[f"{mlp}linear_fc1.layer_norm_{leaf}"]
            qkv = split_qkv(
                ours[f"{attention}linear_qkv.{leaf}"],
                sizes.num_attention_heads,
                sizes.num_attention_heads,
                width,
            )
            for kind, values in zip("qkv", qkv, strict=True):
                theirs[f"{name}attention.{kind}_proj.{leaf}"] = values
            theirs[f"{name}attention.o_proj.{leaf}"] = ours[f"{attention}linear_proj.{leaf}"]
            theirs[f"{name}mlp.fc1.{leaf}"] = ours[f"{mlp}linear_fc1.{leaf}"]
            theirs[f"{name}mlp.fc2.{leaf}"] = ours[f"{mlp}linear_fc2.{leaf}"]
    return theirs


@pytest.mark.parametrize("grid", [(8, 8), (6, 4), (4, 10)], ids=str)
def test_encoder_features(
    model: VisionLanguageModel, config: StageConfig, grid: tuple[int, int]
) -> None:
    """Square and oblong grids: patches, cropped positions, prefix tokens, every layer."""
    sizes = config.model.encoder
    theirs = transformers.RadioModel(
        transformers.RadioConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            mlp_ratio=sizes.ffn_hidden_size / sizes.hidden_size,
            layer_norm_eps=sizes.norm_epsilon,
            patch_size=sizes.patch_size,
            max_img_size=sizes.position_grid * sizes.patch_size,
            num_cls_tokens=4,
            num_registers=sizes.num_prefix_tokens - 4,
            norm_mean=PIXEL_MEAN,
            norm_std=PIXEL_STD,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(encoder_weights(model, config), strict=False)
    assert not unexpected
    assert not [
        name
        for name in missing
        if "layer_scale" not in name and "norm_" not in name and "summary_idxs" not in name
    ]
    tiles_TCHW = torch.randint(
        0, 256, (3, 3, *(edge * sizes.patch_size for edge in grid)), dtype=torch.uint8
    )
    with torch.no_grad():
        ours = model.vision_model(tiles_TCHW)
        expected = theirs(tiles_TCHW.float() / 255).features
    assert ours.shape == (3, *grid, sizes.hidden_size)
    assert relative_error(ours.flatten(1, 2), expected) < TOLERANCE


def test_projector(model: VisionLanguageModel, config: StageConfig) -> None:
    """The published mlp1 written out: RMSNorm, linear, squared ReLU, linear."""
    width = 4 * config.model.encoder.hidden_size
    hidden = torch.randn(37, 1, width, generator=torch.Generator().manual_seed(6))
    weights = model.vision_projection.encoder.state_dict()
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config.model.projector.norm_epsilon)
    normed = hidden * scale * weights["linear_fc1.layer_norm_weight"]
    inner = torch.relu(normed @ weights["linear_fc1.weight"].T) ** 2
    with torch.no_grad():
        ours = model.vision_projection(hidden)
    assert relative_error(ours, inner @ weights["linear_fc2.weight"].T) < TOLERANCE


def test_pixel_shuffle_places_every_patch() -> None:
    """Output (i, j) holds patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1), in this order."""
    patches = torch.arange(4 * 6).reshape(1, 4, 6, 1)
    shuffled = pixel_shuffle(patches)
    assert shuffled.shape == (1, 2, 3, 4)
    assert shuffled[0, 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert shuffled[0, 1].tolist() == [[12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    with pytest.raises(ValueError, match="use a tile of 4x6 patches"):
        pixel_shuffle(torch.zeros(1, 3, 5, 8))

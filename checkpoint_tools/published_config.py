"""config.json of a published model and the model section of a stage, in both directions.

Every field that vLLM, transformers or the published model code reads is written; sizes are read
back from the same fields, and from the timm name of the encoder where a published file gives only
that.

transformers' NemotronH clamps dt from below at `time_step_min` while megatron-core, mamba_ssm and
vLLM do not clamp: the value written is far below any dt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.errors import ConversionError
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_model import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProjectorConfig,
)
from megatron_vl.data.tokenizer import (
    END_OF_TURN,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PAD,
    VISION_TOKENS,
    Tokenizer,
)
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD

ARCHITECTURE = "NemotronH_Nano_VL_V2"
VIDEO = VISION_TOKENS[-1]
BEGIN = "<s>"
NO_FLOOR = 1e-30
"""What `time_step_min` is written as, so that transformers' clamp never acts."""
_LONGEST = 131072
_TEACHERS = ("clip", "siglip", "dino_v2", "sam")
_TIMM_SIZES = {
    (384, 12, 6, 1536): "vit_small_patch16_224",
    (768, 12, 12, 3072): "vit_base_patch16_224",
    (1024, 24, 16, 4096): "vit_large_patch16_224",
    (1280, 32, 16, 5120): "vit_huge_patch16_224",
}
"""The encoders vLLM can build: width, layers, heads, inner width."""
_CUSTOM = "custom"


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens a config names."""

    begin: int
    end_of_turn: int
    pad: int
    image: int
    video: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenIds":
        """Those of a tokenizer. Raises ValueError when it lacks one."""
        ids = (tokenizer.id_of(token) for token in (BEGIN, END_OF_TURN, PAD, IMAGE, VIDEO))
        return cls(*ids)


def published_config(
    stage: StageConfig, vocabulary: int, dtype: str, ids: TokenIds, longest: int | None = None
) -> dict[str, Any]:
    """config.json of a stage's model.

    Args:
        vocabulary: rows of embedding and output matrix in the folder.
        dtype: bfloat16 or float32.
        longest: sequence it is fit for; the stage's sequence_length by default. [tokens]
    """
    model, tile = stage.model, stage.data.tile_size
    longest = min(longest or stage.data.sequence_length, _LONGEST)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": ARCHITECTURE,
        "auto_map": {
            "AutoConfig": f"configuration.{ARCHITECTURE}_Config",
            "AutoModel": f"modeling.{ARCHITECTURE}",
            "AutoModelForCausalLM": f"modeling.{ARCHITECTURE}",
            "AutoModelForImageTextToText": f"modeling.{ARCHITECTURE}",
        },
        "torch_dtype": dtype,
        "llm_config": _decoder_section(model.decoder, vocabulary, longest, dtype, ids),
        "vision_config": _encoder_section(model.encoder, tile, dtype),
        "force_image_size": tile,
        "max_num_tiles": stage.data.max_tiles,
        "patch_size": model.encoder.patch_size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "template": "chat_template.jinja",
        "use_thumbnail": True,
        "vit_hidden_size": model.encoder.hidden_size,
        "projector_hidden_size": model.projector.ffn_hidden_size,
        "projector_norm_epsilon": model.projector.norm_epsilon,
        "norm_mean": list(PIXEL_MEAN),
        "norm_std": list(PIXEL_STD),
        "img_context_token": IMAGE,
        "img_context_token_id": ids.image,
        "img_start_token": IMAGE_START,
        "img_end_token": IMAGE_END,
        "video_context_token": VIDEO,
        "video_context_token_id": ids.video,
        "video_pruning_rate": 0.0,
        "max_sequence_length": longest,
        "tie_word_embeddings": False,
    }


def _decoder_section(
    decoder: DecoderConfig, vocabulary: int, longest: int, dtype: str, ids: TokenIds
) -> dict[str, Any]:
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": decoder.hidden_size,
        "hybrid_override_pattern": decoder.pattern,
        "num_hidden_layers": len(decoder.pattern),
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups,
        "head_dim": decoder.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "intermediate_size": decoder.ffn_hidden_size,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "mamba_num_heads": decoder.mamba_num_heads,
        "mamba_head_dim": decoder.mamba_head_dim,
        "ssm_state_size": decoder.mamba_state_dim,
        "n_groups": decoder.mamba_num_groups,
        "conv_kernel": 4,
        "chunk_size": decoder.mamba_chunk_size,
        "expand": 2,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "use_conv_bias": True,
        "use_bias": False,
        "time_step_min": NO_FLOOR,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "layer_norm_epsilon": decoder.norm_epsilon,
        "initializer_range": decoder.init_std,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "hidden_dropout": 0.0,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": longest,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": ids.begin,
        "eos_token_id": ids.end_of_turn,
        "pad_token_id": ids.pad,
    }


def _encoder_section(encoder: EncoderConfig, tile: int, dtype: str) -> dict[str, Any]:
    sizes = (
        encoder.hidden_size,
        encoder.num_layers,
        encoder.num_attention_heads,
        encoder.ffn_hidden_size,
    )
    rows = encoder.num_prefix_tokens
    teachers = min(len(_TEACHERS), max(1, rows - 1))
    largest = encoder.position_grid * encoder.patch_size
    return {
        "model_type": "radio",
        "version": "radio_v2.5-h",
        "torch_dtype": dtype,
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_attention_heads,
        "intermediate_size": encoder.ffn_hidden_size,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm_epsilon,
        "qkv_bias": True,
        "patch_size": encoder.patch_size,
        "image_size": tile,
        "max_resolution": largest,
        "preferred_resolution": [tile, tile],
        "num_cls_tokens": teachers,
        "num_registers": rows - teachers,
        "summary_idxs": [0, 1],
        "norm_mean": list(PIXEL_MEAN),
        "norm_std": list(PIXEL_STD),
        "video_temporal_patch_size": 1,
        "args": {
            "model": _TIMM_SIZES.get(sizes, _CUSTOM),
            "cpe_max_size": largest,
            # Readers compute the prefix rows as n + (m - n % m), n distinct teachers.
            "cls_token_per_teacher": True,
            "register_multiple": rows if rows > teachers else None,
            "teachers": [{"name": name, "use_summary": True} for name in _TEACHERS[:teachers]],
        },
    }


def servable(encoder: EncoderConfig) -> bool:
    """Whether vLLM can build an encoder of these sizes."""
    return _encoder_section(encoder, 0, "")["args"]["model"] != _CUSTOM


def prefix_tokens(vision: Mapping[str, Any]) -> int:
    """Prefix rows a vision_config describes, as its readers compute them."""
    if "num_cls_tokens" in vision:
        return int(vision["num_cls_tokens"]) + int(vision["num_registers"])
    args = vision["args"]
    names = {teacher["name"] for teacher in args["teachers"]}
    count = len(names) if args.get("cls_token_per_teacher") else 1
    multiple = args.get("register_multiple") or 0
    return count + (multiple - count % multiple) if multiple else count


def model_of(config: Mapping[str, Any]) -> ModelConfig:
    """The model section of a published config.json; both vocabulary sizes are the rows it names.

    Raises:
        ConversionError: another architecture, one matrix for embedding and output, or a field is
            missing.
    """
    try:
        if config.get("architectures") != [ARCHITECTURE]:
            raise ConversionError(
                f"config.json says architectures {config.get('architectures')}; this reads "
                f"[{ARCHITECTURE!r}]. A decoder or an encoder alone goes through `assemble`"
            )
        llm = config.get("llm_config") or config["text_config"]
        if config.get("tie_word_embeddings") or llm.get("tie_word_embeddings"):
            raise ConversionError(
                "config.json says tie_word_embeddings: true, and embedding and output matrix are "
                "two tensors of this model; write both and say false"
            )
        return ModelConfig(
            vocab_size=llm["vocab_size"],
            padded_vocab_size=llm["vocab_size"],
            decoder=decoder_of(llm),
            encoder=encoder_of(config["vision_config"]),
            projector=ProjectorConfig(
                ffn_hidden_size=config["projector_hidden_size"],
                norm_epsilon=config.get("projector_norm_epsilon", 1e-5),
            ),
        )
    except KeyError as error:
        raise ConversionError(f"config.json lacks {error}, which this needs") from error


def decoder_of(llm: Mapping[str, Any]) -> DecoderConfig:
    """The decoder section of a nemotron_h config. Raises KeyError when a field is missing."""
    pattern = llm.get("hybrid_override_pattern")
    if pattern is None:
        signs = {"linear_attention": "M", "mamba": "M", "mlp": "-"}
        signs |= {"full_attention": "*", "attention": "*", "moe": "E"}
        pattern = "".join(signs[kind] for kind in llm["layers_block_type"])
    if "E" in pattern:
        raise ConversionError(
            f"the decoder pattern {pattern!r} has expert layers (E); none is known"
        )
    return DecoderConfig(
        pattern=pattern,
        hidden_size=llm["hidden_size"],
        ffn_hidden_size=llm["intermediate_size"],
        num_attention_heads=llm["num_attention_heads"],
        num_query_groups=llm["num_key_value_heads"],
        head_dim=llm["head_dim"],
        mamba_num_heads=llm["mamba_num_heads"],
        mamba_head_dim=llm["mamba_head_dim"],
        mamba_state_dim=llm["ssm_state_size"],
        mamba_num_groups=llm["n_groups"],
        mamba_chunk_size=llm.get("chunk_size", 128),
        norm_epsilon=llm.get("layer_norm_epsilon", 1e-5),
    )


def encoder_of(vision: Mapping[str, Any]) -> EncoderConfig:
    """The encoder section of a RADIO config. Raises KeyError when a field is missing."""
    args = vision.get("args") or {}
    if "hidden_size" in vision:
        width, heads = vision["hidden_size"], vision["num_attention_heads"]
        layers = vision["num_hidden_layers"]
        inner = vision.get("intermediate_size") or int(width * vision.get("mlp_ratio", 4.0))
    else:
        by_name = {name: sizes for sizes, name in _TIMM_SIZES.items()}
        if args["model"] not in by_name:
            raise ConversionError(
                f"the encoder is a {args['model']!r}; known names are {', '.join(by_name)}"
            )
        width, layers, heads, inner = by_name[args["model"]]
    patch = vision.get("patch_size", 16)
    largest = args.get("cpe_max_size") or vision.get("max_img_size", 2048)
    return EncoderConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        patch_size=patch,
        position_grid=largest // patch,
        num_prefix_tokens=prefix_tokens(vision),
        norm_epsilon=vision.get("layer_norm_eps", 1e-6),
    )

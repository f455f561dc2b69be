"""The rules of the name table, built from a model section.

Sources: the published layout of NemotronH_Nano_VL_V2 as Megatron-Bridge, vLLM and transformers read
it; stored names are those of `train.checkpoint`, where Mamba's fused projections lie in pieces.

Shapes follow the model section; V vocabulary rows, H decoder width, E encoder width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from checkpoint_tools import transforms
from checkpoint_tools.names import Constant, NameTable, Rule, Shape, Slot
from megatron_vl.config.schema import Part
from megatron_vl.config.schema_model import DecoderConfig, EncoderConfig, ModelConfig
from megatron_vl.cost.parameters import CONVOLUTION_TAPS, SHUFFLED_PATCHES, mamba_widths
from megatron_vl.model.initialize import generator_for
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD

DECODER_PREFIX = "language_model."
ENCODER_PREFIX = "vision_model."
_RADIO = ENCODER_PREFIX + "radio_model."


@dataclass(frozen=True)
class Growth:
    """Rows the published side has fewer of than the stored one, and the seed of those added.

    Attributes:
        vocabulary: published rows of embedding and output matrix.
        prefix: published prefix tokens of the encoder.
    """

    vocabulary: int
    prefix: int
    seed: int = 1234


def name_table(model: ModelConfig, growth: Growth | None = None) -> NameTable:
    """The table of a model.

    Args:
        growth: how many vocabulary rows and prefix tokens are published; by default vocab_size
            rows (padding is no token and is not published) and all prefix tokens.

    Raises:
        ValueError: more rows are published than the model has.
    """
    growth = growth or Growth(model.vocab_size, model.encoder.num_prefix_tokens)
    for what, published, own in (
        ("vocabulary rows", growth.vocabulary, model.padded_vocab_size),
        ("prefix tokens", growth.prefix, model.encoder.num_prefix_tokens),
    ):
        if published > own:
            key = "padded_vocab_size" if what.startswith("voc") else "encoder.num_prefix_tokens"
            raise ValueError(
                f"{published} {what} are published, the model has {own}; set model.{key}="
                f"{published} or more"
            )
    rules = [*_decoder_rules(model, growth), *_encoder_rules(model.encoder, growth)]
    rules += _projector_rules(model)
    return NameTable(tuple(rules), _constants(model.encoder))


def _first(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[0]]


def _same(part: Part, stored: str, published: str, shape: Shape, decided_by: str = "") -> Rule:
    """One tensor under two names."""
    return Rule(
        part,
        (Slot(stored, shape, decided_by),),
        (Slot(published, shape, decided_by),),
        _first,
        _first,
    )


def _pieces(
    stored: str, published: str, sizes: Mapping[str, int], rest: Shape, decided_by: str
) -> Rule:
    """Pieces `stored.NAME` of the first dimension and the one published tensor they make up."""
    counts = list(sizes.values())
    return Rule(
        Part.decoder,
        tuple(Slot(f"{stored}.{name}", (size, *rest), decided_by) for name, size in sizes.items()),
        (Slot(published, (sum(counts), *rest), decided_by),),
        lambda tensors: [torch.cat(list(tensors))],
        lambda tensors: list(tensors[0].split(counts)),
    )


def _vocabulary(model: ModelConfig, growth: Growth, stored: str, published: str) -> Rule:
    hidden = model.decoder.hidden_size

    def grow(tensors: Sequence[Tensor]) -> list[Tensor]:
        generator = generator_for(growth.seed, stored + "/grown")
        std = model.decoder.init_std
        rows = model.padded_vocab_size
        return [transforms.grow_vocabulary(tensors[0], rows, std, generator)]

    return Rule(
        Part.decoder,
        (Slot(stored, (model.padded_vocab_size, hidden), "model.padded_vocab_size"),),
        (Slot(published, (growth.vocabulary, hidden), "model.vocab_size"),),
        lambda tensors: [tensors[0][: growth.vocabulary]],
        grow,
    )


def _decoder_rules(model: ModelConfig, growth: Growth) -> list[Rule]:
    decoder, hidden = model.decoder, (model.decoder.hidden_size,)
    theirs = DECODER_PREFIX + "backbone."
    rules = [
        _vocabulary(
            model,
            growth,
            "language_model.embedding.word_embeddings.weight",
            theirs + "embeddings.weight",
        )
    ]
    layer_rules = {"M": _mamba_rules, "-": _mlp_rules, "*": _attention_rules}
    for layer, kind in enumerate(decoder.pattern):
        stored = f"language_model.decoder.layers.{layer}."
        rules += layer_rules[kind](decoder, stored, f"{theirs}layers.{layer}.")
    return [
        *rules,
        _same(
            Part.decoder,
            "language_model.decoder.final_norm.weight",
            theirs + "norm_f.weight",
            hidden,
        ),
        _vocabulary(
            model,
            growth,
            "language_model.output_layer.weight",
            DECODER_PREFIX + "lm_head.weight",
        ),
    ]


def _mamba_rules(decoder: DecoderConfig, stored: str, published: str) -> list[Rule]:
    widths, hidden = mamba_widths(decoder), decoder.hidden_size
    ours, theirs = stored + "mixer.", published + "mixer."
    shared = decoder.mamba_num_groups * decoder.mamba_state_dim
    heads = (decoder.mamba_num_heads,)
    convolved = {"x": widths.inner, "B": shared, "C": shared}
    projected = {"z": widths.inner, **convolved, "dt": decoder.mamba_num_heads}
    same = partial(_same, Part.decoder)
    return [
        same(ours + "in_proj.layer_norm_weight", published + "norm.weight", (hidden,)),
        _pieces(
            ours + "in_proj.weight", theirs + "in_proj.weight", projected, (hidden,),
            "model.decoder.mamba_*",
        ),
        _pieces(
            ours + "conv1d.weight", theirs + "conv1d.weight", convolved, (1, CONVOLUTION_TAPS),
            "model.decoder.mamba_*",
        ),
        _pieces(
            ours + "conv1d.bias", theirs + "conv1d.bias", convolved, (), "model.decoder.mamba_*"
        ),
        *(same(ours + leaf, theirs + leaf, heads) for leaf in ("A_log", "D", "dt_bias")),
        same(ours + "norm.weight", theirs + "norm.weight", (widths.inner,)),
        same(ours + "out_proj.weight", theirs + "out_proj.weight", (hidden, widths.inner)),
    ]  # fmt: skip


def _mlp_rules(decoder: DecoderConfig, stored: str, published: str) -> list[Rule]:
    hidden, inner = decoder.hidden_size, decoder.ffn_hidden_size
    ours, theirs = stored + "mlp.", published + "mixer."
    same = partial(_same, Part.decoder)
    key = "model.decoder.ffn_hidden_size"
    return [
        same(ours + "linear_fc1.layer_norm_weight", published + "norm.weight", (hidden,)),
        same(ours + "linear_fc1.weight", theirs + "up_proj.weight", (inner, hidden), key),
        same(ours + "linear_fc2.weight", theirs + "down_proj.weight", (hidden, inner), key),
    ]


def _attention_rules(decoder: DecoderConfig, stored: str, published: str) -> list[Rule]:
    hidden = decoder.hidden_size
    sizes = (decoder.num_attention_heads, decoder.num_query_groups, decoder.head_dim)
    heads, groups, width = sizes
    ours, theirs = stored + "self_attention.", published + "mixer."
    key = "model.decoder.num_attention_heads, num_query_groups, head_dim"
    same = partial(_same, Part.decoder)
    return [
        same(ours + "linear_qkv.layer_norm_weight", published + "norm.weight", (hidden,)),
        Rule(
            Part.decoder,
            (Slot(ours + "linear_qkv.weight", ((heads + 2 * groups) * width, hidden), key),),
            tuple(
                Slot(f"{theirs}{name}_proj.weight", (count * width, hidden), key)
                for name, count in (("q", heads), ("k", groups), ("v", groups))
            ),
            lambda tensors: transforms.split_grouped_qkv(tensors[0], *sizes),
            lambda tensors: [transforms.join_grouped_qkv(tensors, *sizes)],
        ),
        same(ours + "linear_proj.weight", theirs + "o_proj.weight", (hidden, heads * width), key),
    ]


def _encoder_rules(encoder: EncoderConfig, growth: Growth) -> list[Rule]:
    width = encoder.hidden_size
    theirs = _RADIO + "model.patch_generator."
    same = partial(_same, Part.encoder)
    rules = [
        same(
            "vision_model.embedder.weight",
            theirs + "embedder.weight",
            (width, 3 * encoder.patch_size**2),
            "model.encoder.patch_size",
        ),
        same(
            "vision_model.position_embeddings",
            theirs + "pos_embed",
            (1, encoder.position_grid**2, width),
            "model.encoder.position_grid",
        ),
        _prefix_rule(encoder, growth, theirs + "cls_token.token"),
    ]
    for layer in range(encoder.num_layers):
        rules += _encoder_layer_rules(
            encoder, f"vision_model.decoder.layers.{layer}.", f"{_RADIO}model.blocks.{layer}."
        )
    return rules


def _prefix_rule(encoder: EncoderConfig, growth: Growth, published: str) -> Rule:
    stored, rows = "vision_model.class_token", encoder.num_prefix_tokens

    def grow(tensors: Sequence[Tensor]) -> list[Tensor]:
        if growth.prefix == rows:
            return [tensors[0]]
        generator = generator_for(growth.seed, stored + "/grown")
        return [transforms.prepend_prefix(tensors[0], rows, encoder.init_std, generator)]

    key = "model.encoder.num_prefix_tokens"
    return Rule(
        Part.encoder,
        (Slot(stored, (rows, encoder.hidden_size), key),),
        (Slot(published, (growth.prefix, encoder.hidden_size), key),),
        lambda tensors: [tensors[0][rows - growth.prefix :]],
        grow,
    )


def _encoder_layer_rules(encoder: EncoderConfig, stored: str, published: str) -> list[Rule]:
    width, inner, heads = encoder.hidden_size, encoder.ffn_hidden_size, encoder.num_attention_heads
    attention, mlp = stored + "self_attention.", stored + "mlp."
    same = partial(_same, Part.encoder)

    def both(ours: str, theirs: str, shape: Shape) -> list[Rule]:
        return [
            same(f"{ours}.weight", f"{theirs}.weight", shape),
            same(f"{ours}.bias", f"{theirs}.bias", shape[:1]),
        ]

    def norm(linear: str, theirs: str) -> list[Rule]:
        return [
            same(f"{linear}.layer_norm_{leaf}", f"{theirs}.{leaf}", (width,))
            for leaf in ("weight", "bias")
        ]

    fused = [
        Rule(
            Part.encoder,
            (Slot(f"{attention}linear_qkv.{leaf}", shape),),
            (Slot(f"{published}attn.qkv.{leaf}", shape),),
            lambda tensors: [transforms.heads_outside(tensors[0], heads)],
            lambda tensors: [transforms.heads_inside(tensors[0], heads)],
        )
        for leaf, shape in (("weight", (3 * width, width)), ("bias", (3 * width,)))
    ]
    return [
        *norm(attention + "linear_qkv", published + "norm1"),
        *fused,
        *both(attention + "linear_proj", published + "attn.proj", (width, width)),
        *norm(mlp + "linear_fc1", published + "norm2"),
        *both(mlp + "linear_fc1", published + "mlp.fc1", (inner, width)),
        *both(mlp + "linear_fc2", published + "mlp.fc2", (width, inner)),
    ]


def _projector_rules(model: ModelConfig) -> list[Rule]:
    ours = "vision_projection.encoder."
    width, inner = SHUFFLED_PATCHES * model.encoder.hidden_size, model.projector.ffn_hidden_size
    same = partial(_same, Part.projector)
    key = "model.projector.ffn_hidden_size"
    return [
        same(ours + "linear_fc1.layer_norm_weight", "mlp1.0.weight", (width,)),
        same(ours + "linear_fc1.weight", "mlp1.1.weight", (inner, width), key),
        same(ours + "linear_fc2.weight", "mlp1.3.weight", (model.decoder.hidden_size, inner), key),
    ]


def _constants(encoder: EncoderConfig) -> tuple[Constant, ...]:
    """RADIO's normalisation and summary indices, and the unit layer scales of transformers."""
    colours = [torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD)]
    scales = [
        Constant(
            f"{_RADIO}model.blocks.{layer}.layer_scale{half}.lambda1",
            torch.ones(encoder.hidden_size),
            written=False,
        )
        for layer in range(encoder.num_layers)
        for half in (1, 2)
    ]
    return (
        Constant(_RADIO + "summary_idxs", torch.tensor([0, 1])),
        Constant(_RADIO + "input_conditioner.norm_mean", colours[0]),
        Constant(_RADIO + "input_conditioner.norm_std", colours[1]),
        *scales,
    )

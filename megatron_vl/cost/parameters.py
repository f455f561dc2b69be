"""Exact parameter counts of the model, from a stage's model section alone.

What: counts per part (encoder, projector, decoder) and per kind of layer.
Why: planning, preflight, meters and tests ask one place; a checkpoint's count is checked here.
What it refuses (ValueError): a layer sign the decoder does not know. It checks no other rule.
What it costs: nothing; it imports no torch.

Counted are trained tensors: matrices, biases, norm weights, tables. Not counted: buffers.
Unit of every number: parameters.
"""

from dataclasses import dataclass

from megatron_vl.config.schema_model import DecoderConfig, EncoderConfig, ModelConfig

CONVOLUTION_TAPS = 4
"""Taps of the Mamba-2 layer's causal convolution; megatron-core's default, not a key."""
SHUFFLED_PATCHES = 4
"""Patches that pixel shuffle folds into one decoder token (2 x 2)."""
IMAGE_CHANNELS = 3
"""Colours of a pixel."""


@dataclass(frozen=True)
class DecoderParameters:
    """Parameters of the decoder; a layer's pre-norm belongs to the layer."""

    embedding: int
    output: int
    final_norm: int
    mamba_layer: int
    mlp_layer: int
    attention_layer: int
    layers: int

    @property
    def total(self) -> int:
        """All of the decoder: embedding, layers, final norm and output matrix."""
        return self.embedding + self.layers + self.final_norm + self.output


@dataclass(frozen=True)
class EncoderParameters:
    """Parameters of the vision encoder; it has no final norm."""

    patch_embedding: int
    position_table: int
    prefix_tokens: int
    layer: int
    layers: int

    @property
    def total(self) -> int:
        """All of the encoder."""
        return self.patch_embedding + self.position_table + self.prefix_tokens + self.layers


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of the three parts."""

    encoder: EncoderParameters
    projector: int
    decoder: DecoderParameters

    @property
    def total(self) -> int:
        """All of the model."""
        return self.encoder.total + self.projector + self.decoder.total

    def of_parts(self, parts: set[str]) -> int:
        """Parameters of the named parts (encoder, projector, decoder)."""
        return sum(count for name, count in self.by_part().items() if name in parts)

    def by_part(self) -> dict[str, int]:
        """Part name to count."""
        return {
            "encoder": self.encoder.total,
            "projector": self.projector,
            "decoder": self.decoder.total,
        }


@dataclass(frozen=True)
class MambaWidths:
    """Widths inside a Mamba-2 layer, in channels."""

    inner: int
    convolved: int
    projected: int


def mamba_widths(decoder: DecoderConfig) -> MambaWidths:
    """Widths of the scan (heads x head width), of the convolution and of the input projection."""
    inner = decoder.mamba_num_heads * decoder.mamba_head_dim
    convolved = inner + 2 * decoder.mamba_num_groups * decoder.mamba_state_dim
    return MambaWidths(inner, convolved, inner + convolved + decoder.mamba_num_heads)


def mamba_matrices(decoder: DecoderConfig) -> int:
    """Input and output projection of a Mamba-2 layer, no bias."""
    widths = mamba_widths(decoder)
    return (widths.projected + widths.inner) * decoder.hidden_size


def mlp_matrices(decoder: DecoderConfig) -> int:
    """Up and down projection of an MLP layer, no gate, no bias."""
    return 2 * decoder.hidden_size * decoder.ffn_hidden_size


def attention_matrices(decoder: DecoderConfig) -> int:
    """Query, key, value and output projections of an attention layer, no bias."""
    query = decoder.num_attention_heads * decoder.head_dim
    key = decoder.num_query_groups * decoder.head_dim
    return (2 * query + 2 * key) * decoder.hidden_size


def encoder_matrices(encoder: EncoderConfig) -> int:
    """Matrices of one encoder layer, without their biases."""
    width = encoder.hidden_size
    return 4 * width * width + 2 * width * encoder.ffn_hidden_size


def projector_matrices(model: ModelConfig) -> int:
    """Both matrices of the projector, no bias."""
    width = SHUFFLED_PATCHES * model.encoder.hidden_size
    return (width + model.decoder.hidden_size) * model.projector.ffn_hidden_size


def decoder_parameters(model: ModelConfig) -> DecoderParameters:
    """Count the decoder, with embedding and output of `padded_vocab_size` rows (not tied).

    Raises:
        ValueError: the pattern holds a sign other than M, - and *.
    """
    decoder = model.decoder
    hidden, widths = decoder.hidden_size, mamba_widths(decoder)
    convolution = widths.convolved * (CONVOLUTION_TAPS + 1)  # taps and bias
    per_head = 3 * decoder.mamba_num_heads  # A_log, D, dt_bias
    layer = {
        "M": mamba_matrices(decoder) + convolution + per_head + widths.inner + hidden,
        "-": mlp_matrices(decoder) + hidden,
        "*": attention_matrices(decoder) + hidden,
    }
    unknown = sorted(set(decoder.pattern) - set(layer))
    if unknown:
        raise ValueError(f"decoder pattern holds {''.join(unknown)!r}; known signs are M, -, *")
    table = model.padded_vocab_size * hidden
    return DecoderParameters(
        embedding=table,
        output=table,
        final_norm=hidden,
        mamba_layer=layer["M"],
        mlp_layer=layer["-"],
        attention_layer=layer["*"],
        layers=sum(layer[sign] for sign in decoder.pattern),
    )


def encoder_parameters(encoder: EncoderConfig) -> EncoderParameters:
    """Count the encoder: patch embedding without bias, table, prefix tokens and layers.

    A layer holds the matrices and biases of attention and MLP and two LayerNorms.
    """
    width, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    biases = 4 * width + ffn + width
    norms = 2 * 2 * width
    layer = encoder_matrices(encoder) + biases + norms
    return EncoderParameters(
        patch_embedding=IMAGE_CHANNELS * encoder.patch_size**2 * width,
        position_table=encoder.position_grid**2 * width,
        prefix_tokens=encoder.num_prefix_tokens * width,
        layer=layer,
        layers=encoder.num_layers * layer,
    )


def projector_parameters(model: ModelConfig) -> int:
    """Count the projector: RMSNorm weight over four folded patches and two matrices."""
    return SHUFFLED_PATCHES * model.encoder.hidden_size + projector_matrices(model)


def model_parameters(model: ModelConfig) -> ModelParameters:
    """Count all three parts of a model.

    Raises:
        ValueError: the decoder's pattern holds an unknown sign.
    """
    return ModelParameters(
        encoder=encoder_parameters(model.encoder),
        projector=projector_parameters(model),
        decoder=decoder_parameters(model),
    )

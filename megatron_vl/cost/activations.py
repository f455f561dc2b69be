"""What a rank keeps of a micro-batch for its backward pass, and what it needs beside, at most.

What: bytes of activations by part of the model, of the states of the Mamba scan, of logits, and of
the work in progress, with recompute, from a stage's config alone.
Why: planning and preflight; what fills a device is activations as often as weights.
What it refuses: nothing; `config.check` guards the config. What it costs: nothing; no torch.

Counted is what the autograd graph holds, layer by layer, as the layers are written here: the input
of every norm; the input of every matrix that learns; what each activation function, convolution,
scan, gate and attention keeps of its own. Fused kernels keep the same or a little less. A
recomputed layer keeps its input alone. Work in progress is the largest layer that is computed
again, or half of one that is not (its gradients; what it kept goes as they come). The largest pack
is assumed: every place of it that can show a picture does.

An estimate, not an account: allocators, communication buffers and kernels' scratch come on top.
Against the tensors alive in a step on the laptop it is right to a factor of 1.3 (tests/cost).
"""

from dataclasses import dataclass

from megatron_vl.config.schema import Part, StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.config.schema_model import LAYER_KINDS
from megatron_vl.cost.bytes import bytes_of
from megatron_vl.cost.parameters import IMAGE_CHANNELS, SHUFFLED_PATCHES, mamba_widths
from megatron_vl.cost.recompute import pipeline_stages

LOGIT_BYTES = 4
"""Logits and their gradients are float32."""


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one rank at its fullest.

    Attributes:
        encoder: pictures and the encoder's layers.
        projector: the projector and what it gives.
        decoder: the decoder's layers and norms, the scan's states aside; a teacher's last hidden
            states of all packs of a step.
        mamba_states: states that the scan keeps, one a chunk.
        logits: of one chunk of tokens, with their gradients.
        work: the layer that is being computed again or differentiated.
    """

    encoder: int
    projector: int
    decoder: int
    mamba_states: int
    logits: int
    work: int

    @property
    def kept(self) -> int:
        """What waits for the backward pass."""
        return self.encoder + self.projector + self.decoder + self.mamba_states

    @property
    def total(self) -> int:
        """The most at one time: the logits are gone when the layers' backward pass begins."""
        return self.kept + max(self.logits, self.work)


@dataclass(frozen=True)
class _Kept:
    """Elements that a layer keeps: always; where it learns; states, in float32; its input."""

    always: float
    learning: float
    states: float
    input: float


def most_units(config: StageConfig) -> int:
    """The most tiles or frames that a pack can show."""
    data = config.data
    edge = data.tile_size // config.model.encoder.patch_size
    tokens = max(1, edge * edge // SHUFFLED_PATCHES) * (1 - max(data.video.evs_rate))
    fitting = int(data.sequence_length / tokens)
    return min(fitting, data.max_tiles_per_pack or fitting)


def activation_bytes(config: StageConfig, stage: int) -> ActivationBytes:
    """What each rank of a pipeline stage needs at most; stage 0 is the first."""
    parallel, width = config.parallel, bytes_of(config.precision)
    stages = pipeline_stages(config.model.decoder.pattern, parallel)
    micro_batches = max(1, config.train.global_batch // parallel.data)
    in_flight = min(micro_batches, len(stages) - stage)
    first, last = stage == 0, stage == len(stages) - 1
    encoder, encoder_layer = _encoder(config) if first else (0.0, 0.0)
    projector = _projector(config) if first else 0.0
    learns = Part.decoder in config.train.trainable
    differentiated = learns or first or bool(set(config.train.trainable) - {Part.decoder})
    kept = states = largest = 0.0
    for index, symbol in enumerate(stages[stage]):
        layer = _decoder_layer(config, symbol)
        whole = layer.always + layer.learning * learns
        size = whole * width + 4 * layer.states
        recompute = config.recompute
        if index < recompute.decoder and LAYER_KINDS[symbol] in recompute.kinds:
            kept, largest = kept + layer.input, max(largest, size)
        else:
            kept, states = kept + whole, states + layer.states
            largest = max(largest, size / 2)
    rows = _rows(config)
    hidden = config.model.decoder.hidden_size
    kept += last * 2 * rows * hidden + rows * hidden
    kept, states = kept * differentiated, states * differentiated
    # A teacher has run over all packs of the step before the student begins.
    taught = last and config.distill.student is not StudentFormat.none
    teacher = taught * micro_batches * rows * hidden
    return ActivationBytes(
        encoder=round(in_flight * width * encoder),
        projector=round(in_flight * width * projector),
        decoder=round(width * (in_flight * kept + teacher)),
        mamba_states=round(in_flight * 4 * states),
        logits=last * _logits(config),
        work=round(max(largest, width * encoder_layer)),
    )


def _tokens(config: StageConfig) -> float:
    """Tokens of a pack on a rank, inside a layer."""
    return config.data.sequence_length / config.parallel.context


def _rows(config: StageConfig) -> float:
    """Tokens of a pack on a rank, between layers."""
    return _tokens(config) / (config.parallel.tensor if config.parallel.sequence else 1)


def _decoder_layer(config: StageConfig, symbol: str) -> _Kept:
    """What one layer of a kind keeps."""
    decoder, tensor = config.model.decoder, config.parallel.tensor
    tokens, stream = _tokens(config) / tensor, _rows(config) * decoder.hidden_size
    if symbol == "-":
        inner = tokens * decoder.ffn_hidden_size
        return _Kept(stream + inner, stream + inner, 0, stream)
    if symbol == "*":
        query = decoder.num_attention_heads * decoder.head_dim
        keys = 2 * decoder.num_query_groups * decoder.head_dim
        gathered = keys * tokens * (config.parallel.context - 1)
        return _Kept(stream + tokens * (2 * query + keys) + gathered, stream, 0, stream)
    widths = mamba_widths(decoder)
    # Context ranks share heads; a group that several of them need is copied.
    copies = max(1, tensor * config.parallel.context // decoder.mamba_num_groups)
    copies = copies if config.parallel.context > 1 else 1
    shared = 2 * decoder.mamba_num_groups * decoder.mamba_state_dim * (copies - 1)
    # The projection, the convolution's output, the scan's output, and the norm's input.
    inside = widths.projected + widths.convolved + 2 * shared + 2 * widths.inner
    states = tokens * widths.inner * decoder.mamba_state_dim / decoder.mamba_chunk_size
    return _Kept(stream + tokens * inside, stream + tokens * widths.inner, states, stream)


def _units(config: StageConfig) -> int:
    """Tiles and frames that one context rank encodes."""
    return -(-most_units(config) // config.parallel.context)


def _encoder(config: StageConfig) -> tuple[float, float]:
    """Elements the encoder keeps, and those of its work in progress."""
    encoder, tensor = config.model.encoder, config.parallel.tensor
    edge = config.data.tile_size // encoder.patch_size
    tokens = _units(config) * (edge * edge + encoder.num_prefix_tokens)
    width, inner = encoder.hidden_size, encoder.ffn_hidden_size
    # Two norms and what they give; queries, keys, values and the result; around the GELU.
    layer = tokens * (4 * width + (4 * width + 2 * inner) / tensor)
    if Part.encoder not in config.train.trainable:
        return 0.0, layer / 2
    patches = _units(config) * edge * edge * IMAGE_CHANNELS * encoder.patch_size**2
    again = min(config.recompute.encoder, encoder.num_layers)
    kept = (encoder.num_layers - again) * layer + again * tokens * width
    return kept + patches + tokens * width, layer if again else layer / 2


def _projector(config: StageConfig) -> float:
    """Elements kept around the projector, the embeddings of all context ranks included."""
    if set(config.train.trainable) == {Part.decoder}:
        return 0.0
    edge = config.data.tile_size // config.model.encoder.patch_size
    embeddings = _units(config) * edge * edge / SHUFFLED_PATCHES
    wide = SHUFFLED_PATCHES * config.model.encoder.hidden_size
    inner = 2 * config.model.projector.ffn_hidden_size / config.parallel.tensor
    return embeddings * (2 * wide + inner + config.model.decoder.hidden_size)


def _logits(config: StageConfig) -> int:
    """Logits, exponentials and gradients of one chunk."""
    chunk = min(config.train.loss_chunk, round(_tokens(config)))
    return 3 * LOGIT_BYTES * chunk * config.model.padded_vocab_size // config.parallel.tensor

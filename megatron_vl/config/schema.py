"""The schema of a stage file: every key a stage YAML may hold, with its meaning, unit and reader.

One dataclass per section, one docstring per field. A field's docstring is a sentence followed by
`[unit; reader]`, where the reader is the room that acts on the key. `config.explain` parses these
docstrings, so the text below is what `mvl config explain` prints.

No field here is optional decoration: a key without a reader does not belong in this file.
Defaults are the published 12B values (arXiv 2511.03929) where the paper states one.
This module imports neither torch nor megatron-core, so that a login node can read stage files.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Precision(Enum):
    """Arithmetic of the forward and backward passes; optimizer state stays in float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Part(Enum):
    """A separately trainable part of the model."""

    encoder = "encoder"
    projector = "projector"
    decoder = "decoder"


class WeightSource(Enum):
    """Where a stage's starting weights come from."""

    random = "random"
    previous = "previous"


@dataclass
class DecoderConfig:
    """The hybrid Mamba-2/Transformer language decoder."""

    pattern: str = MISSING
    """One character a layer: M is Mamba-2, - is an MLP, * is attention. [string; model]"""
    hidden_size: int = MISSING
    """Width of the residual stream. [channels; model]"""
    ffn_hidden_size: int = MISSING
    """Inner width of an MLP layer (up, squared ReLU, down; no gate). [channels; model]"""
    num_attention_heads: int = MISSING
    """Query heads of an attention layer. [heads; model]"""
    num_query_groups: int = MISSING
    """Key/value heads of an attention layer; divides the query heads. [heads; model]"""
    head_dim: int = MISSING
    """Width of one attention head; query width is heads times this. [channels; model]"""
    mamba_num_heads: int = MISSING
    """Heads of the state-space layer; a multiple of parallel.tensor. [heads; model]"""
    mamba_head_dim: int = MISSING
    """Channels of one state-space head. [channels; model]"""
    mamba_state_dim: int = MISSING
    """State size N of each state-space channel. [channels; model]"""
    mamba_num_groups: int = MISSING
    """Groups that share B and C; divides the heads, a multiple of parallel.tensor. [groups;
    model]"""
    mamba_chunk_size: int = 128
    """Chunk length of the SSD scan: speed and memory, not results. [tokens; kernels]"""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weight matrices. [1; model]"""


@dataclass
class EncoderConfig:
    """The RADIO vision transformer."""

    num_layers: int = MISSING
    """Transformer layers. [layers; model]"""
    hidden_size: int = MISSING
    """Width of the residual stream. [channels; model]"""
    ffn_hidden_size: int = MISSING
    """Inner width of the GELU MLP. [channels; model]"""
    num_attention_heads: int = MISSING
    """Attention heads; head width is hidden_size over this. [heads; model]"""
    patch_size: int = 16
    """Edge of a square patch; divides data.tile_size. [pixels; model]"""
    position_grid: int = 128
    """Edge of the learned position table; a tile's grid is cropped from its top left. [patches;
    model]"""
    num_prefix_tokens: int = 16
    """Class and register tokens, prepended and dropped after the last layer. [tokens; model]"""
    norm_epsilon: float = 1e-6
    """Epsilon of every LayerNorm of the encoder. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weight matrices. [1; model]"""


@dataclass
class ProjectorConfig:
    """RMSNorm, linear, squared ReLU, linear: from 4 shuffled patches to one decoder token."""

    ffn_hidden_size: int = MISSING
    """Inner width. [channels; model]"""
    norm_epsilon: float = 1e-5
    """Epsilon of the input RMSNorm. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weights. [1; model]"""


@dataclass
class ModelConfig:
    """The composed vision-language model."""

    vocab_size: int = MISSING
    """Tokenizer entries, added special tokens included. [tokens; model, data]"""
    padded_vocab_size: int = MISSING
    """Rows of the embedding and output matrices; at least vocab_size, a multiple of
    parallel.tensor. [tokens; model]"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The language decoder. [section; model]"""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The vision encoder. [section; model]"""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """The projector between them. [section; model]"""


@dataclass
class DataConfig:
    """What is read, how it is tiled and packed."""

    root: str = MISSING
    """Folder of the prepared data sets and the tokenizer, relative to the working directory. [path;
    data]"""
    builder: str = "none"
    """Which recipe `mvl data prepare` runs to fill root: laptop, or none for data made elsewhere.
    [name; data]"""
    blend: dict[str, float] = field(default_factory=dict)
    """Share of samples drawn from each source under root, relative to the others. [weight by
    source; data]"""
    sequence_length: int = MISSING
    """Length every pack is padded to, the most one sample may fill. [tokens; data, model]"""
    tile_size: int = 512
    """Edge of a square image tile. [pixels; data, model]"""
    max_tiles: int = 12
    """Most tiles of one image, its thumbnail not counted. [tiles; data]"""
    packing: bool = True
    """Pack several samples into one sequence; off puts one sample in each. [bool; data]"""
    packing_window: int = 5000
    """Samples the packer looks at together. [samples; data]"""
    prefetch: int = 2
    """Global batches decoded ahead of the step that needs them. [batches; data]"""


@dataclass
class ParallelConfig:
    """How the ranks share one model and one batch; ranks = tensor * pipeline * context * data."""

    tensor: int = 1
    """Ranks that split every weight matrix. [ranks; engine]"""
    pipeline: int = 1
    """Ranks that split the decoder's layers; encoder and projector sit on the first. [ranks;
    engine]"""
    context: int = 1
    """Ranks that split one sequence. [ranks; engine]"""
    data: int = 1
    """Ranks that split the global batch; the optimizer state is sharded over them. [ranks;
    engine]"""
    sequence: bool = False
    """Split activations between tensor ranks along the sequence; needs tensor > 1. [bool;
    engine]"""
    first_stage_layers: int = 0
    """Decoder layers on the first pipeline stage; 0 splits evenly. [layers; engine]"""

    @property
    def ranks(self) -> int:
        """Processes of the layout."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = MISSING
    """Peak learning rate. [1; train]"""
    min_lr: float = 0.0
    """Learning rate at the last step. [1; train]"""
    warmup_fraction: float = 0.1
    """Part of the steps spent in linear warm-up from 0. [fraction of train.steps; train]"""
    beta1: float = 0.9
    """Decay of the first moment. [1 a step; train]"""
    beta2: float = 0.999
    """Decay of the second moment. [1 a step; train]"""
    epsilon: float = 1e-8
    """Added to the root of the second moment. [1; train]"""
    weight_decay: float = 0.05
    """Decoupled decay of matrices; vectors and biases are never decayed. [1 a step, times lr;
    train]"""
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down. [1; train]"""


@dataclass
class TrainConfig:
    """What a stage trains, for how long, and how often it looks up."""

    trainable: list[Part] = MISSING
    """Parts that learn; the others are frozen and carry no gradient or optimizer state. [parts;
    train]"""
    steps: int = MISSING
    """Optimizer steps of the stage. [steps; train]"""
    global_batch: int = MISSING
    """Sequences of one step over all ranks; a multiple of parallel.data. [sequences; train,
    data]"""
    seed: int = 1234
    """Seed of initialisation and of the data order. [integer; train, data]"""
    threads: int = 0
    """CPU threads of one rank's arithmetic; 0 shares the machine's cores between its ranks.
    [threads; train]"""


@dataclass
class EvaluationConfig:
    """Held-out loss during training."""

    every: int = 0
    """Steps between evaluations; 0 leaves the two that always run: before the first step and after
    the last. [steps; train]"""
    batches: int = 1
    """Global batches of the held-out split in one evaluation. [batches; train]"""


@dataclass
class CheckpointConfig:
    """When a stage saves, and what."""

    every: int = 0
    """Steps between saves; one always follows the last step, 0 writes that one only. [steps;
    train]"""
    optimizer: bool = True
    """Save the optimizer state with the last step's weights; saves between always hold it. [bool;
    train]"""


@dataclass
class CarryConfig:
    """What a stage takes over from the one before it. Nothing is implied."""

    weights: WeightSource = WeightSource.previous
    """Take the previous stage's weights, or draw all of them at random. [choice; train]"""
    fresh: list[Part] = field(default_factory=list)
    """Parts drawn anew although weights are carried over. [parts; train]"""
    optimizer: bool = False
    """Take over the optimizer's moments; the trainable parts must then be the same. [bool;
    train]"""
    data_cursor: bool = False
    """Go on in the data order where the previous stage stopped. [bool; train]"""


@dataclass
class StageConfig:
    """One stage of a recipe, as `config.load` returns it: resolved, checked, complete."""

    name: str = MISSING
    """Name of the stage: init, stage0 ... stage4, or your own. [string; run]"""
    precision: Precision = Precision.bf16
    """Arithmetic of forward and backward. [choice; engine]"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model. [section; model]"""
    data: DataConfig = field(default_factory=DataConfig)
    """The data. [section; data]"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout. [section; engine]"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer. [section; train]"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop. [section; train]"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss. [section; train]"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving. [section; train]"""
    carry: CarryConfig = field(default_factory=CarryConfig)
    """What comes from the stage before. [section; train]"""

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
    """Arithmetic of the forward and backward passes; optimizer state stays in float32.

    The FP8 recipes quantize the linears' operands: one scale a tensor, one a block (1x128 of
    activations and gradients, 128x128 of weights), or one a tensor made from the steps before.
    Everything else of theirs is bf16.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_tensorwise = "fp8_tensorwise"
    fp8_blockwise = "fp8_blockwise"
    fp8_delayed = "fp8_delayed"

    @property
    def is_fp8(self) -> bool:
        """One of the FP8 recipes."""
        return self.name.startswith("fp8_")


class Part(Enum):
    """A separately trainable part of the model."""

    encoder = "encoder"
    projector = "projector"
    decoder = "decoder"


class LayerKind(Enum):
    """A kind of decoder layer."""

    mamba = "mamba"
    mlp = "mlp"
    attention = "attention"


LAYER_KINDS = {"M": LayerKind.mamba, "-": LayerKind.mlp, "*": LayerKind.attention}
"""The kind behind each character of a decoder pattern."""


class WeightSource(Enum):
    """Where a stage's starting weights come from."""

    random = "random"
    previous = "previous"


class BlendUnit(Enum):
    """What the weights of a blend share out."""

    samples = "samples"
    tokens = "tokens"


class SourceEnd(Enum):
    """What happens when a source has given all its epochs."""

    stop = "stop"
    go_on = "go_on"


class Packer(Enum):
    """How the samples of a window are put into packs; see `data/packing.py`."""

    best_fit = "best_fit"
    greedy_knapsack = "greedy_knapsack"
    first_fit = "first_fit"
    balanced = "balanced"


class PackOrder(Enum):
    """The order of packs: equally heavy packs in a row, or any."""

    aligned = "aligned"
    random = "random"


class Tiling(Enum):
    """How an image becomes visual units."""

    published = "published"
    area_weighted = "area_weighted"
    native = "native"
    native_matched = "native_matched"


class FrameLabels(Enum):
    """What stands between the frames of a video."""

    newline = "newline"
    joined = "joined"


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
class VideoConfig:
    """Which frames of a clip are shown, what is written before each, and what is pruned."""

    fps: float = 2.0
    """Frames taken from each second of a clip. [frames a second; data]"""
    min_frames: int = 8
    """Fewest frames of a clip; one that has fewer shows all. [frames; data]"""
    max_frames: int = 128
    """Most frames of a clip; a longer one is sampled evenly. [frames; data]"""
    labels: FrameLabels = FrameLabels.newline
    """A newline before every frame's label but the first (newline: later vLLM, training), or
    nothing between frames (joined: earlier vLLM, TensorRT-LLM, SGLang). [choice; data]"""
    evs_rate: list[float] = field(default_factory=lambda: [0.0])
    """Part of a clip's embeddings that efficient video sampling prunes: one number, or the two ends
    of a range that every sample draws its own from. [fraction; data]"""


@dataclass
class DataConfig:
    """What is read, how it is tiled and packed."""

    root: str = MISSING
    """Folder of the prepared data sets and the tokenizer, relative to the working directory. [path;
    data]"""
    builder: str = "none"
    """Which recipe `mvl data prepare` runs to fill root: laptop, or none for data made elsewhere.
    [name; data]"""
    blend_file: str = ""
    """File that blend, blend_unit, epochs and when_source_ends are read from when the stage is
    loaded, relative to the file that names it; a resolved stage holds what it said. [path; data]"""
    blend: dict[str, float] = field(default_factory=dict)
    """Share drawn from each source under root, relative to the others; set as a whole, it also
    puts blend_unit and epochs back to their defaults. [weight by source; data]"""
    blend_unit: BlendUnit = BlendUnit.samples
    """Whether the weights share out samples or tokens. [choice; data]"""
    epochs: dict[str, float] = field(default_factory=dict)
    """How often a source is gone through before it ends; sources not named here never do. [epochs
    by source; data]"""
    when_source_ends: SourceEnd = SourceEnd.go_on
    """End the data when the first source has given its epochs, or go on with the other sources.
    [choice; data]"""
    sequence_length: int = MISSING
    """Length every pack is padded to, the most one sample may fill. [tokens; data, model]"""
    tile_size: int = 512
    """Edge of a square image tile. [pixels; data, model]"""
    max_tiles: int = 12
    """Most tiles of one image, its thumbnail not counted. [tiles; data]"""
    tiling: Tiling = Tiling.published
    """Images in tiles, by nearest ratio (published) or by ratio and area (area_weighted), or whole
    at their own resolution (native) or at the resolution that costs as many tokens as published
    tiling (native_matched). [choice; data]"""
    min_patches: int = 256
    """Fewest patches of a whole image; data.tiling native reads it. [patches; data]"""
    max_patches: int = 12288
    """Most patches of a whole image; data.tiling native reads it. [patches; data]"""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Frames of video. [section; data]"""
    packing: bool = True
    """Pack several samples into one sequence; off puts one sample in each. [bool; data]"""
    packing_window: int = 5000
    """Samples the packer looks at together. [samples; data]"""
    document_alignment: int = 1
    """Documents are padded to a multiple of this many tokens; a multiple of 2*parallel.context
    where that is above 1. [tokens; data]"""
    packer: Packer = Packer.best_fit
    """How the samples of a window are put into packs. [choice; data]"""
    spare_packs: float = 0.01
    """Packs the balanced packer opens beyond the fewest possible: a fraction of those below 1, a
    number from 1 on (20 is published). [fraction or packs; data]"""
    max_tiles_per_pack: int = 0
    """Most tiles of one pack, which bounds the encoder's memory; 0 sets no limit. [tiles; data]"""
    max_samples_per_pack: int = 0
    """Most samples of one pack; 0 sets no limit. [samples; data]"""
    order: PackOrder = PackOrder.aligned
    """Let equally heavy packs follow each other, so that data-parallel ranks do not wait for each
    other, or shuffle packs freely. [choice; data]"""
    aligned_packs: int = 0
    """Packs in a row that cost about the same when order is aligned: as many as data-parallel ranks
    or a multiple; 0 takes the whole global batch, which serves any number. [packs; data]"""
    workers: int = 1
    """Threads of each rank that read and decode packs. [threads; data]"""
    prefetch: int = 2
    """Global batches decoded ahead of the step that needs them. [batches; data]"""
    max_bad_fraction: float = 0.001
    """Largest share of samples that may be unreadable and replaced before the run fails; 0 fails at
    the first. [fraction; data]"""


@dataclass
class ParallelConfig:
    """How the ranks share one model and one batch; ranks = tensor * pipeline * context * data."""

    tensor: int = 1
    """Ranks that split every weight matrix. [ranks; engine]"""
    pipeline: int = 1
    """Ranks that split the decoder's layers; encoder and projector sit on the first. [ranks;
    engine]"""
    context: int = 1
    """Ranks that share the tokens of every document, the Mamba heads and the pictures of a
    sequence. [ranks; engine]"""
    data: int = 1
    """Ranks that split the global batch; the optimizer state is sharded over them. [ranks;
    engine]"""
    sequence: bool = False
    """Split activations between tensor ranks along the sequence; needs tensor > 1. [bool;
    engine]"""
    first_stage_layers: int = 0
    """Decoder layers on the first pipeline stage; 0 splits evenly. [layers; engine]"""
    virtual_pipeline: int = 1
    """Slices of the decoder on each pipeline rank; 1, as megatron-core's hybrid stack cannot
    interleave. [slices; engine]"""

    @property
    def ranks(self) -> int:
        """Processes of the layout."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class RecomputeConfig:
    """Layers whose activations are computed again in the backward pass instead of kept."""

    decoder: int = 0
    """Decoder layers, counted from the first of each pipeline stage. [layers a stage; engine]"""
    encoder: int = 0
    """Encoder layers, counted from the first; a frozen encoder keeps nothing anyway. [layers;
    engine]"""
    kinds: list[LayerKind] = field(default_factory=lambda: list(LayerKind))
    """Which of those decoder layers: mamba, mlp, attention. [kinds; engine]"""


@dataclass
class Fp8Config:
    """What the FP8 precisions leave in BF16, and how they are watched."""

    first_layers_bf16: int = 1
    """Layers kept in BF16 at the start of the decoder and of the encoder. [layers; engine]"""
    last_layers_bf16: int = 1
    """Layers kept in BF16 at the end of the decoder and of the encoder. [layers; engine]"""
    keep_bf16: list[str] = field(default_factory=list)
    """Further layers kept in BF16, named as the drift meter prints them: decoder.5, encoder.0,
    projector. [layers; engine]"""
    amax_history: int = 16
    """Steps whose largest magnitude sets the scales of fp8_delayed. [steps; engine]"""
    drift_every: int = 0
    """Steps between drift reports: a micro-batch is also run in BF16, and the layer that differs
    most is named; 0 turns them off. [steps; train]"""


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
    loss_chunk: int = 1024
    """Tokens whose logits exist at a time; less is less memory and slower. [tokens; model]"""
    peak_tflops: float = 0.0
    """Peak of one rank's device in the stage's precision, which utilisation is measured by; 0
    leaves it unsaid. [TFLOP/s; train]"""


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
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation recompute. [section; engine]"""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """FP8. [section; engine]"""
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

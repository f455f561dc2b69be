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

from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_distill import DistillConfig
from megatron_vl.config.schema_gate import GateConfig
from megatron_vl.config.schema_model import LayerKind, ModelConfig


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


class WeightSource(Enum):
    """Where a stage's starting weights come from."""

    random = "random"
    previous = "previous"


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
    """Optimizer steps of the stage; left out where they follow from train.tokens or train.samples.
    [steps; train]"""
    tokens: int = 0
    """Tokens of the stage, the padding of packs included, from which train.steps follow; 0 states
    none. [tokens; config]"""
    samples: int = 0
    """Samples of the stage, from which train.steps follow where every sequence holds one
    (data.packing false); 0 states none. [samples; config]"""
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
    packs: int = 0
    """Packs of each stage's held-out set that this stage looks at after its last step; a multiple
    of parallel.data, 0 looks at its own set alone. [packs; train]"""
    longest_pack: int = 0
    """Longest packs of another stage's set that are looked at; 0 sets no limit. [tokens; train]"""


@dataclass
class CheckpointConfig:
    """When a stage saves, and what."""

    every: int = 0
    """Steps between saves; one always follows the last step, 0 writes that one only. [steps;
    train]"""
    optimizer: bool = True
    """Save the optimizer state with the last step's weights; saves between always hold it. [bool;
    train]"""
    any_layout: bool = False
    """Saves between load at any layout, not only at the same tensor and pipeline ranks; each then
    gathers the optimizer state over data ranks, as the last one does. [bool; train]"""
    async_save: bool = True
    """Train on while a save is written, from a copy of the state in host memory. [bool; train]"""


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
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Learning from a teacher. [section; train]"""
    after: str = ""
    """Stage or node this one comes after, whose checkpoint `carry` takes from; empty: the file
    before it among those that do not say either. [stage; launch]"""
    gate: GateConfig = field(default_factory=GateConfig)
    """What its metrics must be before the stages behind it start. [section; launch]"""

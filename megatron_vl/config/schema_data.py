"""The `data` section of a stage file; see `schema`."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


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
    tokenizer: str = ""
    """A released tokenizer.json that the builder puts beside the data, relative to the working
    directory; empty trains one on the data. [path; data]"""
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

"""When a key is read at all: the switches that other keys depend on.

What: for each key that only some stages read, the keys that decide so, the rule, and its words.
Why: a setting without effect misleads whoever reads the file. A key that is set where nothing reads
it is refused, with the key and the way out.

A stage that inherits such a key from a base and turns its switch off later (`precision=bf16` on an
FP8 recipe) has contradicted nobody: there the key goes back to its default, and `mvl plan` says so.
A resolved stage therefore holds defaults in every key that it does not read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_vl.config.schema import Part, Precision, StageConfig
from megatron_vl.config.schema_data import Packer, PackOrder, Tiling
from megatron_vl.config.schema_distill import StudentFormat


@dataclass(frozen=True)
class Condition:
    """When a key is read.

    Attributes:
        switches: the keys that decide.
        holds: whether a stage reads the key.
        words: what must be so, to end "... is only read where".
        way_out: a setting under which the key is read.
    """

    switches: tuple[str, ...]
    holds: Callable[[StageConfig], bool]
    words: str
    way_out: str


_FP8 = Condition(
    ("precision",),
    lambda config: config.precision.is_fp8,
    "precision is one of the FP8 recipes",
    "precision: fp8_blockwise",
)
_PACKS = Condition(
    ("data.packing",),
    lambda config: config.data.packing,
    "data.packing is true",
    "data.packing: true",
)
_NATIVE = Condition(
    ("data.tiling",),
    lambda config: config.data.tiling is Tiling.native,
    "data.tiling is native",
    "data.tiling: native",
)

_DISTILLS = Condition(
    ("distill.student",),
    lambda config: config.distill.student is not StudentFormat.none,
    "distill.student names a number format",
    "distill.student: nvfp4",
)

CONDITIONS: Mapping[str, Condition] = {
    "fp8.first_layers_bf16": _FP8,
    "fp8.last_layers_bf16": _FP8,
    "fp8.keep_bf16": _FP8,
    "fp8.drift_every": _FP8,
    "fp8.amax_history": Condition(
        ("precision",),
        lambda config: config.precision is Precision.fp8_delayed,
        "precision is fp8_delayed",
        "precision: fp8_delayed",
    ),
    "recompute.kinds": Condition(
        ("recompute.decoder",),
        lambda config: config.recompute.decoder > 0,
        "recompute.decoder is above 0",
        "recompute.decoder: 1 or more",
    ),
    "recompute.encoder": Condition(
        ("train.trainable",),
        lambda config: Part.encoder in config.train.trainable,
        "train.trainable names the encoder; a frozen one keeps nothing",
        "train.trainable with encoder",
    ),
    "gate.otherwise": Condition(
        ("gate.at_least", "gate.at_most", "gate.drop_at_most", "gate.rise_at_most"),
        lambda config: config.gate.asks,
        "the gate has a bound",
        "gate.at_least or another bound",
    ),
    "data.min_patches": _NATIVE,
    "data.max_patches": _NATIVE,
    "data.packer": _PACKS,
    "data.max_samples_per_pack": _PACKS,
    "data.spare_packs": Condition(
        ("data.packer", "data.packing"),
        lambda config: config.data.packing and config.data.packer is Packer.balanced,
        "data.packer is balanced, which alone opens spare packs",
        "data.packer: balanced",
    ),
    "data.aligned_packs": Condition(
        ("data.order",),
        lambda config: config.data.order is PackOrder.aligned,
        "data.order is aligned",
        "data.order: aligned",
    ),
    "distill.temperature": _DISTILLS,
    "distill.calibration_batches": _DISTILLS,
}
"""Keys that some stages do not read. A key that is not named here is read by every stage."""

PLATFORM_KEYS: Mapping[str, str] = {"train.threads": "ranks on CPUs"}
"""Keys that matter on one platform alone, and which."""


def value_of(config: StageConfig, key: str) -> object:
    """The value of a dotted key of the schema."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def unread_keys(config: StageConfig) -> Iterator[str]:
    """The keys that a stage does not read and that hold something else than their default."""
    default = StageConfig()
    for key, condition in CONDITIONS.items():
        if not condition.holds(config) and value_of(config, key) != value_of(default, key):
            yield key


def check_conditions(config: StageConfig) -> Iterator[str]:
    """A message for each key that is set where nothing reads it."""
    for key in unread_keys(config):
        condition = CONDITIONS[key]
        yield (
            f"{key} is {value_of(config, key)!r}, but is only read where {condition.words}; take "
            f"it out, or set {condition.way_out}"
        )

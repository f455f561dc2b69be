"""How long a stage is: its steps, or the tokens or samples that they follow from.

A recipe states one of `train.steps`, `train.tokens` and `train.samples`; the other two stay 0 or
follow. Stated twice (a resolved stage holds the steps and what they came from), they must agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vl.config.schema import StageConfig

STEPS = "train.steps"
STATED = ("train.tokens", "train.samples")
"""The keys that steps may follow from."""
LENGTH_KEYS = (STEPS, *STATED)


@dataclass(frozen=True)
class Derivation:
    """How steps follow from a stated amount."""

    amount: int
    unit: str
    """tokens or samples."""
    per_step: int
    per_step_words: str

    @property
    def steps(self) -> int:
        """The nearest whole number of steps, at least 1."""
        return max(1, round(self.amount / self.per_step))

    def text(self) -> str:
        """The arithmetic on one line."""
        return f"{self.amount:,} {self.unit} / ({self.per_step_words}) = {self.steps:,} steps"


def steps_from(key: str, amount: int, global_batch: int, sequence_length: int) -> Derivation:
    """The steps that a value of `train.tokens` or `train.samples` makes; sizes are above 0."""
    batch = f"{global_batch:,} sequences"
    if key == "train.samples":
        return Derivation(amount, "samples", global_batch, f"{batch}, one sample in each")
    words = f"{batch} x {sequence_length:,} tokens"
    return Derivation(amount, "tokens", global_batch * sequence_length, words)


def derivations(config: StageConfig) -> dict[str, Derivation]:
    """What a stage says that its steps follow from, by key."""
    train, length = config.train, config.data.sequence_length
    amounts = {"train.tokens": train.tokens, "train.samples": train.samples}
    return {
        key: steps_from(key, amount, train.global_batch, length)
        for key, amount in amounts.items()
        if amount
    }


def check_length(config: StageConfig) -> Iterator[str]:
    """What a stage says of its length must agree."""
    for key, derivation in derivations(config).items():
        if derivation.steps != config.train.steps:
            yield (
                f"{STEPS} is {config.train.steps}, but {key} says {derivation.text()}; nearest "
                f"valid: {STEPS} {derivation.steps}, or {key} 0"
            )
    if config.train.samples and config.data.packing:
        yield (
            f"train.samples is {config.train.samples}, but data.packing is true and a sequence "
            "holds several samples; set train.tokens (the samples' tokens), or data.packing: false"
        )

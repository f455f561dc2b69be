"""What a stage hands to the next, held against what the next expects, for `mvl plan`.

Vocabulary, tokenizer, shapes, context, trainable sets, optimizer and data cursor. What a config
alone can break is refused when it is loaded (`config.check`); what stands on disk is looked at
here: the tokenizer beside each stage's data must be one and the same, and fit the vocabulary.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.tables import print_table
from megatron_vl.config.recipe import Recipe
from megatron_vl.config.schema import StageConfig, WeightSource
from megatron_vl.config.schema_node import AssembleNode

TOKENIZER = Path("tokenizer", "tokenizer.json")
"""Where a data root holds its tokenizer."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer file: what it is and the ids it gives."""

    digest: str
    size: int


@dataclass(frozen=True)
class Contract:
    """What one stage takes over and how."""

    stage: str
    parent: str
    vocabulary: str
    tokenizer: str
    """Twelve digits of its digest, or why there are none."""
    shapes: str
    context: str
    trains: str
    optimizer: str
    data: str


def contracts(
    recipe: Recipe, parents: Mapping[str, str | None], names: Sequence[str]
) -> tuple[list[Contract], list[str]]:
    """The contracts of the training stages among `names`, and what breaks one.

    Args:
        parents: the stage or node whose checkpoint each takes.
    """
    tokenizers: dict[str, Tokenizer | None] = {}
    configs = {name: config for name, _, config in recipe.stages}
    for config in configs.values():
        if config.data.root not in tokenizers:
            tokenizers[config.data.root] = read_tokenizer(Path(config.data.root))
    found, problems = [], []
    for name in names:
        if name not in configs:
            continue
        config, parent = configs[name], parents[name]
        before = configs.get(parent or "")
        found.append(_contract(recipe, config, parent, before, tokenizers))
        problems += _problems(config, before, tokenizers)
    return found, list(dict.fromkeys(problems))


def read_tokenizer(root: Path) -> Tokenizer | None:
    """The tokenizer of a data root; None where it has none yet."""
    path = root / TOKENIZER
    if not path.is_file():
        return None
    text = path.read_bytes()
    said = json.loads(text)
    added = [token["id"] for token in said.get("added_tokens", [])]
    entries = said.get("model", {}).get("vocab", {})
    ids = entries.values() if isinstance(entries, dict) else range(len(entries))
    size = max([*added, *ids], default=-1) + 1
    return Tokenizer(hashlib.sha256(text).hexdigest(), size)


def _contract(
    recipe: Recipe,
    config: StageConfig,
    parent: str | None,
    before: StageConfig | None,
    tokenizers: Mapping[str, Tokenizer | None],
) -> Contract:
    model, carry, length = config.model, config.carry, config.data.sequence_length
    tokenizer = tokenizers[config.data.root]
    carried = carry.weights is WeightSource.previous
    shapes = "drawn" if not carried else f"those of {parent}"
    if carried and parent is not None and isinstance(recipe[parent].config, AssembleNode):
        shapes = f"put together by {parent}"
    learns = " ".join(part.name for part in config.train.trainable)
    fresh = " ".join(part.name for part in carry.fresh)
    context = f"{length:,}"
    if before is not None and before.data.sequence_length != length:
        context = f"{before.data.sequence_length:,} -> {length:,}"
    return Contract(
        stage=config.name,
        parent=parent or "-",
        vocabulary=f"{model.vocab_size:,} of {model.padded_vocab_size:,} rows",
        tokenizer=tokenizer.digest[:12] if tokenizer else "not there yet",
        shapes=shapes,
        context=context,
        trains=learns + (f", {fresh} drawn anew" if fresh else ""),
        optimizer="goes on" if carry.optimizer else "new",
        data="goes on" if carry.data_cursor else "from the start",
    )


def _problems(
    config: StageConfig,
    before: StageConfig | None,
    tokenizers: Mapping[str, Tokenizer | None],
) -> list[str]:
    problems = []
    own = tokenizers[config.data.root]
    if own is not None and own.size > config.model.vocab_size:
        problems.append(
            f"{config.name}: {Path(config.data.root) / TOKENIZER} gives ids up to {own.size - 1}, "
            f"model.vocab_size is {config.model.vocab_size}; nearest valid: {own.size}"
        )
    if before is None or config.carry.weights is not WeightSource.previous:
        return problems
    theirs = tokenizers[before.data.root]
    if own is not None and theirs is not None and own.digest != theirs.digest:
        problems.append(
            f"{config.name}: the tokenizer in {config.data.root} ({own.digest[:12]}) is not that "
            f"of {before.name} in {before.data.root} ({theirs.digest[:12]}), whose embeddings it "
            f"takes over; prepare the data with {Path(before.data.root) / TOKENIZER}"
        )
    return problems


def print_contracts(found: Sequence[Contract]) -> None:
    """A table of what each stage takes over."""
    names = ("stage", "from", "vocabulary", "tokenizer", "shapes", "context", "trains")
    rows = [
        (c.stage, c.parent, c.vocabulary, c.tokenizer, c.shapes, c.context, c.trains,
         c.optimizer, c.data)
        for c in found
    ]  # fmt: skip
    title = "what each stage takes over"
    print_table(title, (*names, "optimizer", "data"), rows, left=9)

"""`mvl checkpoint diff`: how two sets of weights differ, in config, data and each module.

Either side is a checkpoint or a published folder; both are read under published names, tensor by
tensor, so padding rows of the vocabulary do not count. Change is the L2 norm of B - A over that of
A, in float64. Where the models differ in size, tensors of other shapes are listed, not compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NameTable, Rule
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import CONFIG_FILE, PublishedFolder
from checkpoint_tools.stage_source import StageSource, open_stage
from megatron_vl.config.load import differences
from megatron_vl.config.schema_model import ModelConfig

_BLOCK = 1 << 22
"""Numbers compared at a time."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        tensors: gives the published tensors of a rule.
        source: the checkpoint it is; None for a published folder.
    """

    path: Path
    model: ModelConfig
    table: NameTable
    tensors: Callable[[Rule], Sequence[Tensor]]
    source: StageSource | None


@dataclass(frozen=True)
class Change:
    """How one module changed.

    Attributes:
        relative: L2 norm of the difference over that of A; 0 means bitwise equal.
        largest: largest absolute difference.
    """

    module: str
    tensors: int
    relative: float
    largest: float


@dataclass(frozen=True)
class Difference:
    """All that differs between A and B.

    Attributes:
        config: value in A and in B by key.
        state: stage, step and data cursor, where both are checkpoints.
        changes: every module both have, in the model's order.
        only_a, only_b: tensors the other side lacks or has in another shape.
    """

    config: dict[str, tuple[Any, Any]]
    state: dict[str, tuple[Any, Any]]
    changes: list[Change]
    only_a: list[str]
    only_b: list[str]


def diff(a: Path, b: Path) -> Difference:
    """Compare two checkpoints or published folders. Raises what opening either raises."""
    one, other = _open(a), _open(b)
    of_a, of_b = _by_tensors(one.table), _by_tensors(other.table)
    sums: dict[str, _Sum] = {}
    for key, rule in of_a.items():
        if key in of_b:
            total = sums.setdefault(_module(rule), _Sum())
            pairs = zip(one.tensors(rule), other.tensors(of_b[key]), strict=True)
            for before, after in pairs:
                total.add(before, after)
    return Difference(
        config=_config(one, other),
        state=_state(one, other),
        changes=[total.change(module) for module, total in sums.items()],
        only_a=[name for key in of_a.keys() - of_b.keys() for name, _ in key],
        only_b=[name for key in of_b.keys() - of_a.keys() for name, _ in key],
    )


def _open(path: Path) -> Side:
    if (path / CONFIG_FILE).is_file():
        folder = PublishedFolder(path)
        model = model_of(folder.config)
        table = name_table(model)
        table.check_published(folder.shapes(), str(path))

        def published(rule: Rule) -> Sequence[Tensor]:
            return [folder.read(slot.name) for slot in rule.published]

        return Side(path, model, table, published, None)
    source = open_stage(path)

    def read(rule: Rule) -> Sequence[Tensor]:
        return rule.to_published([source.checkpoint.read(slot.name) for slot in rule.stored])

    return Side(path, source.config.model, source.table, read, source)


def _by_tensors(table: NameTable) -> dict[tuple[tuple[str, tuple[int, ...]], ...], Rule]:
    """Rules by the names and shapes of their published tensors."""
    return {tuple((slot.name, slot.shape) for slot in rule.published): rule for rule in table.rules}


def _module(rule: Rule) -> str:
    """The module a rule's tensors belong to, by its name in training."""
    name = rule.stored[0].name
    if len(rule.stored) > 1:
        name = name.rpartition(".")[0]  # a piece of a fused projection
    return name.rpartition(".")[0]


class _Sum:
    def __init__(self) -> None:
        self._tensors = 0
        self._square = self._moved = self._largest = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in one tensor, block by block."""
        self._tensors += 1
        blocks = zip(before.reshape(-1).split(_BLOCK), after.reshape(-1).split(_BLOCK), strict=True)
        for old, new in blocks:
            wide = old.double()
            moved = new.double() - wide
            self._square += float(wide.square().sum())
            self._moved += float(moved.square().sum())
            self._largest = max(self._largest, float(moved.abs().max()))

    def change(self, module: str) -> Change:
        """What it comes to; a module of zeros that moved has changed without bound."""
        relative = 0.0
        if self._moved:
            relative = (self._moved / self._square) ** 0.5 if self._square else float("inf")
        return Change(module, self._tensors, relative, self._largest)


def _config(one: Side, other: Side) -> dict[str, tuple[Any, Any]]:
    if one.source is not None and other.source is not None:
        return differences(one.source.config, other.source.config)
    before, after = _flat(asdict(one.model)), _flat(asdict(other.model))
    # A published config holds neither of these.
    return {
        f"model.{key}": (before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.endswith(("init_std", "padded_vocab_size"))
    }


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _state(one: Side, other: Side) -> dict[str, tuple[Any, Any]]:
    if one.source is None or other.source is None:
        return {}
    before, after = asdict(one.source.state), asdict(other.source.state)
    for state in (before, after):
        del state["files"]  # digests of files: what differs inside them is told by the weights
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def diff_text(found: Difference) -> str:
    """The difference for a reader; modules that did not change are counted only."""
    lines: list[str] = []
    for title, values in (("config", found.config), ("state", found.state)):
        lines.append(title if values else f"{title}: the same")
        lines += [f"  {key}: {before} -> {after}" for key, (before, after) in values.items()]
    changed = [change for change in found.changes if change.relative > 0]
    lines.append(
        f"weights: {len(changed)} of {len(found.changes)} modules differ"
        + (" (relative change, largest difference)" if changed else "")
    )
    width = max((len(change.module) for change in changed), default=0)
    lines += [f"  {c.module:{width}}  {c.relative:9.3e}  {c.largest:9.3e}" for c in changed]
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        lines += [f"  only in {side}, or in another shape: {name}" for name in sorted(names)]
    return "\n".join(lines)

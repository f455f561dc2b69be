"""`mvl checkpoint diff`: how two sets of weights differ, in config, data and each module.

Either side is a checkpoint or a published folder; both are read under published names, tensor by
tensor, so padding rows of the vocabulary do not count, and quantized tensors are compared as the
numbers they stand for. Change is the L2 norm of B - A over that of A, in float64. Where the models
differ in size, tensors of other shapes are listed, not compared.

Refuses what opening either side refuses. Costs one read of both; hashes are not looked at.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint_tools.decode import read_decoded
from checkpoint_tools.explain import PROVENANCE_FILE, check_published_folder, provenance
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NameTable, Rule
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import CONFIG_FILE, PublishedFolder, read_json
from checkpoint_tools.quantized_layout import described
from checkpoint_tools.stage_source import StageSource, open_stage
from megatron_vl.config.load import differences
from megatron_vl.config.schema_model import ModelConfig

_BLOCK = 1 << 22
"""Numbers compared at a time."""
_MADE_FROM = ("stage", "step", "data_cursor", "trainable", "digest", "parent_digest")
"""What is compared of a checkpoint and of the one a published folder was made from."""
_DIGEST = re.compile("[0-9a-f]{64}")
_BAR = 24
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        form: of a published folder, the type or number format of its weights; "" of a checkpoint.
        tensors: gives the published tensors of a rule.
        source: the checkpoint it is; None for a published folder.
        made_from: which checkpoint it is or was made from; empty where nothing says so.
    """

    model: ModelConfig
    form: str
    table: NameTable
    tensors: Callable[[Rule], Sequence[Tensor]]
    source: StageSource | None
    made_from: dict[str, Any]


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
        config: value in A and in B by key; of the model alone unless both are checkpoints.
        state: the same of stage, step, data cursor and digest; None where a side does not say.
        parts: encoder, projector and decoder, each as a whole.
        changes: every module both have, in the model's order.
        only_a, only_b: tensors the other side lacks or has in another shape.
    """

    config: dict[str, tuple[Any, Any]]
    state: dict[str, tuple[Any, Any]] | None
    parts: list[Change]
    changes: list[Change]
    only_a: list[str]
    only_b: list[str]


def diff(a: Path, b: Path) -> Difference:
    """Compare two checkpoints or published folders. Raises what opening either raises."""
    one, other = _open(a), _open(b)
    of_a, of_b = _by_tensors(one.table), _by_tensors(other.table)
    sums: dict[str, _Sum] = {}
    parts: dict[str, _Sum] = {}
    for key, rule in of_a.items():
        if key in of_b:
            total, whole = sums.setdefault(_module(rule), _Sum()), _Sum()
            pairs = zip(one.tensors(rule), other.tensors(of_b[key]), strict=True)
            for before, after in pairs:
                whole.add(before, after)
            for sum_ in (total, parts.setdefault(rule.part.value, _Sum())):
                sum_.join(whole)
    return Difference(
        config=_config(one, other),
        state=_state(one, other),
        parts=[total.change(part) for part, total in parts.items()],
        changes=[total.change(module) for module, total in sums.items()],
        only_a=[name for key in of_a.keys() - of_b.keys() for name, _ in key],
        only_b=[name for key in of_b.keys() - of_a.keys() for name, _ in key],
    )


def _open(path: Path) -> Side:
    if (path / CONFIG_FILE).is_file():
        folder = PublishedFolder(path)
        model = model_of(folder.config)
        table = name_table(model)
        check_published_folder(folder, table)
        chosen, made = described(folder.config), path / PROVENANCE_FILE
        form = f"{chosen.format} ({chosen.layout})" if chosen else folder.config["torch_dtype"]

        def published(rule: Rule) -> Sequence[Tensor]:
            return [read_decoded(folder.read, slot.name, rule, chosen) for slot in rule.published]

        made_from = read_json(made) if made.is_file() else {}
        return Side(model, form, table, published, None, made_from)
    source = open_stage(path)

    def read(rule: Rule) -> Sequence[Tensor]:
        return rule.to_published([source.checkpoint.read(slot.name) for slot in rule.stored])

    return Side(source.config.model, "", source.table, read, source, provenance(source))


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

    def join(self, other: "_Sum") -> None:
        """Take in all that another has."""
        self._tensors += other._tensors
        self._square += other._square
        self._moved += other._moved
        self._largest = max(self._largest, other._largest)

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
    found = {
        f"model.{key}": (before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.endswith(("init_std", "padded_vocab_size"))
    }
    if one.form and other.form and one.form != other.form:
        found["weights"] = (one.form, other.form)
    return found


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _state(one: Side, other: Side) -> dict[str, tuple[Any, Any]] | None:
    if not (one.made_from and other.made_from):
        return None
    before, after = ({key: side.made_from.get(key) for key in _MADE_FROM} for side in (one, other))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def diff_text(found: Difference) -> str:
    """The difference for a reader; modules that did not change are counted only.

    A bar's length is the module's change beside the largest one's.
    """
    lines: list[str] = []
    for title, values in (("config", found.config), ("state", found.state)):
        if values is None:
            lines.append(f"{title}: not known of both")
            continue
        lines.append(title if values else f"{title}: the same")
        lines += [f"  {key}: {_short(a)} -> {_short(b)}" for key, (a, b) in values.items()]
    changed = [change for change in found.changes if change.relative > 0]
    lines.append(f"weights: {len(changed)} of {len(found.changes)} modules differ")
    if changed:
        lines += _table([part for part in found.parts if part.relative > 0], changed)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        lines += [f"  only in {side}, or in another shape: {name}" for name in sorted(names)]
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A value as text, of a digest the first characters."""
    return value[:12] if _DIGEST.fullmatch(str(value)) else str(value)


def _table(parts: list[Change], changed: list[Change]) -> list[str]:
    width = max(len(change.module) for change in changed)
    largest = max((c.relative for c in changed if c.relative != float("inf")), default=1.0)

    def row(change: Change) -> str:
        bar = "#" * round(_BAR * min(change.relative / largest, 1.0))
        numbers = f"{change.relative:9.3e}  {change.largest:9.3e}"
        return f"  {change.module:{width}}  {numbers}  {bar}".rstrip()

    head = f"  {'':{width}}  {'relative':9}  {'largest':9}"
    return [head.rstrip(), *map(row, parts), "", *map(row, changed)]

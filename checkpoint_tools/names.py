"""The one table of names: published Hugging Face tensors and the stored megatron-core ones.

What: every stored and every published tensor of a model with its shape, and rules that turn the
one into the other. Import, export, assemble and diff all walk this table.
Why one: a name that only one tool knows is a tensor that the next release loses.
What it refuses: a set of tensors that is not exactly the model's (`NameTable.check_*`): one error
with all that is missing, over, or of another shape, and the nearest names.
What it costs: nothing; it holds no tensors.

The rules themselves are in `name_rules`.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_vl.config.schema import Part

Shape = tuple[int, ...]
Transform = Callable[[Sequence[Tensor]], list[Tensor]]

_LISTED = 8
"""Names an error lists of each kind."""


class NamesError(ValueError):
    """A set of tensors that is not the model's; the message lists what differs."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place: its name, its shape, and which keys of the model section decide it."""

    name: str
    shape: Shape
    decided_by: str = ""


@dataclass(frozen=True)
class Rule:
    """A few stored tensors and the published ones that hold the same numbers.

    Attributes:
        to_published, to_stored: from the tensors of one side, in order, to those of the other.
    """

    part: Part
    stored: tuple[Slot, ...]
    published: tuple[Slot, ...]
    to_published: Transform
    to_stored: Transform


@dataclass(frozen=True)
class Constant:
    """A published tensor that this model has no parameter for, as all its entries are known."""

    name: str
    value: Tensor
    written: bool = True
    """Whether an export holds it; otherwise it is only accepted."""


@dataclass(frozen=True)
class NameTable:
    """All rules of a model, in the order tensors are written."""

    rules: tuple[Rule, ...]
    constants: tuple[Constant, ...] = ()

    def stored(self) -> dict[str, Slot]:
        """Stored slots by name."""
        return {slot.name: slot for rule in self.rules for slot in rule.stored}

    def published(self) -> dict[str, Slot]:
        """Published slots by name, constants not counted."""
        return {slot.name: slot for rule in self.rules for slot in rule.published}

    def of_part(self, part: Part, prefix: str) -> "NameTable":
        """One part alone, its published names without `prefix`: a decoder's own folder."""

        def strip(slots: Iterable[Slot]) -> tuple[Slot, ...]:
            return tuple(replace(s, name=s.name.removeprefix(prefix)) for s in slots)

        return NameTable(
            tuple(
                replace(rule, published=strip(rule.published))
                for rule in self.rules
                if rule.part is part
            ),
            tuple(
                replace(constant, name=constant.name.removeprefix(prefix))
                for constant in self.constants
                if constant.name.startswith(prefix)
            ),
        )

    def check_stored(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise NamesError unless `found` (name to shape) is exactly the stored side."""
        compare(self.stored(), found, where, "stored")

    def check_published(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise NamesError unless `found` is exactly the published side; constants may lack."""
        known = {constant.name: tuple(constant.value.shape) for constant in self.constants}
        kept = {name: shape for name, shape in found.items() if known.get(name) != shape}
        compare(self.published(), kept, where, "published")


def compare(
    expected: Mapping[str, Slot], found: Mapping[str, Shape], where: str, side: str
) -> None:
    """Raise NamesError unless `found` (name to shape) is exactly what is expected.

    Args:
        where, side: whose names they are, and of which kind, for the message.
    """
    missing = [name for name in expected if name not in found]
    over = [name for name in found if name not in expected]
    reshaped = [
        name for name, slot in expected.items() if name in found and found[name] != slot.shape
    ]
    if not (missing or over or reshaped):
        return
    lines = [f"{where} does not hold this model under its {side} names:"]
    lines += _listing("missing", missing, lambda name: _nearest(name, over, "there is"))
    lines += _listing("over", over, lambda name: _nearest(name, list(expected), "expected is"))
    lines += _listing(
        "of another shape", reshaped, lambda name: _shapes(expected[name], found[name])
    )
    raise NamesError("\n".join(lines))


def _listing(what: str, names: list[str], say: Callable[[str], str]) -> list[str]:
    lines = [f"  {what}: {name}{say(name)}" for name in names[:_LISTED]]
    rest = len(names) - _LISTED
    return [*lines, f"  {what}: and {rest} more"] if rest > 0 else lines


def _nearest(name: str, others: list[str], word: str) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f" ({word} {close[0]})" if close else ""


def _shapes(slot: Slot, found: Shape) -> str:
    reason = f", which {slot.decided_by} decides" if slot.decided_by else ""
    return f" is {list(found)}, expected {list(slot.shape)}{reason}"

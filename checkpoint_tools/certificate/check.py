"""What a certificate is made of: checks with what they measured and the bound they were held to."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CERTIFICATE_FILE = "certificate.json"
PAGE_FILE = "certificate.html"
SCHEMA = 1
_LEAST = {"prompts": 8, "packs": 1, "new_tokens": 1}
_LISTED = 6
"""Names a check lists before it counts the rest."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        measured: a number or a few words.
        bound: what it had to be.
        says: what is wrong, naming file, tensor, layer or prompt; empty where nothing is.
    """

    name: str
    passed: bool
    measured: Any
    bound: Any
    says: str = ""


@dataclass(frozen=True)
class Bounds:
    """What measurements are held to; any other than these defaults shows in the certificate.

    Attributes:
        layers: largest difference of a layer's output or of logits, relative to the largest value.
        replaced: least difference of the logits when a picture is replaced.
        pixels: largest difference of a normalised pixel; one grey level is 0.014.
        kl_fp8, kl_nvfp4: mean divergence from BF16 over held-out answers. [nats a token]
        top1_fp8, top1_nvfp4: share of places with the same most likely token.
        new_tokens: greedy tokens that must be equal.
        prompts: conversations that must give equal ids and pixels.
        packs: held-out packs that divergence is measured on.
    """

    layers: float = 1e-4
    replaced: float = 1e-3
    pixels: float = 1e-5
    kl_fp8: float = 1e-3
    kl_nvfp4: float = 2e-2
    top1_fp8: float = 0.99
    top1_nvfp4: float = 0.95
    new_tokens: int = 32
    prompts: int = 50
    packs: int = 8

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Bounds":
        """Bounds from `NAME=VALUE` words. Raises ValueError for an unknown name or no number."""
        given: dict[str, Any] = {}
        published = asdict(cls())
        for word in words:
            name, _, value = word.partition("=")
            if name not in published:
                near = difflib.get_close_matches(name, published, 1, 0.0)[0]
                raise ValueError(
                    f"--bound {word}: there is no bound {name!r}; nearest valid: {near} (there are "
                    f"{', '.join(published)})"
                )
            try:
                given[name] = type(published[name])(value)
            except ValueError:
                kind = "whole number" if isinstance(published[name], int) else "number"
                raise ValueError(f"{word!r}: {name} is a {kind}, as in {published[name]}") from None
            least = _LEAST.get(name, 0)
            if given[name] < least:
                raise ValueError(f"{word!r}: the least is {least}")
        return cls(**given)

    def changed(self) -> dict[str, list[Any]]:
        """Bounds that are not the published ones: [published, used] by name."""
        published = asdict(Bounds())
        return {
            name: [published[name], value]
            for name, value in asdict(self).items()
            if value != published[name]
        }


class StoppedError(Exception):
    """A check could not be made; it is noted, and what builds on it is not run."""


@dataclass
class Findings:
    """Checks as they come.

    Attributes:
        report: told a line after each.
        figures: what was measured without a bound.
        not_run: checks that needed one that failed, with the reason.
    """

    report: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, passed: bool, measured: Any, bound: Any, says: str = "") -> bool:
        """Note a check; gives back whether it passed."""
        self.checks.append(Check(name, passed, measured, bound, says))
        self.report(f"{name}: {'passed' if passed else 'FAILED'}" + (f": {says}" if says else ""))
        return passed

    def none_of(self, name: str, wrong: Sequence[str], of: int, what: str) -> bool:
        """Note a check that passes when nothing is wrong.

        Args:
            wrong: sentences or names, one each.
            of: how many were looked at.
            what: of what kind they are, in the plural.
        """
        says = listing(wrong)
        return self.add(name, not wrong, f"{len(wrong)} of {of} {what}", f"0 {what}", says)

    def attempt(
        self, name: str, bound: Any, work: Callable[[], Any], errors: tuple[type[Exception], ...]
    ) -> Any:
        """What `work` gives; an error among `errors` is a failed check of its own.

        Raises:
            StoppedError: such an error was noted.
        """
        try:
            return work()
        except errors as error:
            self.add(name, False, type(error).__name__, bound, str(error))
            raise StoppedError(name) from error

    @property
    def passed(self) -> bool:
        """Whether all that had to be checked was, and held."""
        return not self.not_run and all(check.passed for check in self.checks)


def listing(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    every = list(names)
    rest = len(every) - _LISTED
    return "; ".join(every[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")

"""How long a model may think before it answers.

A trace ends where the model ends it, or at the first line end after its budget, or `GRACE` tokens
past the budget wherever it stands (arXiv 2508.14444 and 2511.03929, section 4.3). What is written
then is what the model was trained to write there; broken off in the middle of a line, the line is
closed first, as the published client does it.
"""

from dataclasses import dataclass

GRACE = 500
"""Tokens past the budget after which a trace is broken off."""
END = "</think>"
_CLOSING = END + "\n\n"
_BREAKING_OFF = ".\n" + _CLOSING


@dataclass
class Thinking:
    """Follows one trace and says when to close it.

    Args:
        budget: tokens it may take; None is without bound.
        grace: see `GRACE`.

    Raises:
        ValueError: a negative budget.
    """

    budget: int | None = None
    grace: int = GRACE

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"the reasoning budget is {self.budget} tokens; the least is 0")

    def closing(self, num_tokens: int, piece: str) -> str:
        """What to write now to end the trace; empty while it may go on.

        Args:
            num_tokens: of the trace so far.
            piece: the text of its last token.
        """
        if self.budget is None or num_tokens <= self.budget:
            return ""
        if "\n" in piece:
            return _CLOSING if piece.endswith("\n") else "\n" + _CLOSING
        return _BREAKING_OFF if num_tokens >= self.budget + self.grace else ""

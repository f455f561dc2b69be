"""From logits to the next token: the likeliest, or drawn.

The paper's settings: greedy with reasoning off, temperature 0.6 and top-p 0.95 with it on. What is
drawn depends on the logits and the seed alone, not on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        top_k: draw from so many likeliest tokens; 0 from all.
        seed: of the draws.

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; the least is 0 (greedy)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; the least is 0 (all tokens)")


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token after logits (V,)."""
        if self._sampling.temperature == 0.0:
            return int(logits_V.argmax())
        probabilities_V = kept_probabilities(logits_V.double().cpu(), self._sampling)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


def kept_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with (V,), adding up to 1: top-k first, then top-p."""
    scaled_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(scaled_V):
        least = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < least, -torch.inf)
    probabilities_V = scaled_V.softmax(-1)
    if sampling.top_p < 1.0:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token stays while those before it have not reached the sum.
        over_V = sorted_V.cumsum(-1) - sorted_V >= sampling.top_p
        probabilities_V[order_V[over_V]] = 0.0
    return probabilities_V / probabilities_V.sum()

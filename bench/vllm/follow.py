"""This project along the tokens vLLM chose, and how far the two lie apart.

An answer is read twice. `ours` is what `mvl generate` computes, in float32. `as served` differs
where vLLM does, to tell its ways from faults: the encoder sees the pixels that vLLM's own
preprocessing made (it resizes in float, training in 8 bits as Pillow does), and `as_served.py` does
the rest. A reading that cannot differ is left out.

Shapes: V vocabulary, P patches, F numbers of a patch, T tiles, S a tile's edge.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.vllm.questions import Case
from megatron_vl.data.pack import Pack, patches_of
from megatron_vl.infer.decode import prompt_of
from megatron_vl.infer.model import OpenModel

OURS, AS_SERVED = "ours", "as served"


@dataclass(frozen=True)
class Bound:
    """How far an answer of vLLM may lie from ours.

    Attributes:
        behind: a token of it below our first choice; 0 asks for equal tokens. [nats]
        mean: log-probabilities of its tokens from ours, on average. [nats]
    """

    behind: float
    mean: float


@dataclass(frozen=True)
class Followed:
    """One answer read by this project.

    Attributes:
        reading: OURS or AS_SERVED.
        equal: tokens of it that are this project's own choice.
        tokens: how many it has.
        behind: how far the others lie below that choice at most. [nats]
        mean, largest: difference of log-probabilities over the tokens. [nats]
    """

    reading: str
    equal: int
    tokens: int
    behind: float
    mean: float
    largest: float

    def within(self, bound: Bound) -> bool:
        """Whether nothing contradicts; a log-probability that is no number does."""
        equal = self.equal == self.tokens or self.behind < bound.behind
        return self.tokens > 0 and equal and self.mean <= bound.mean


@torch.no_grad()
def follow(model: OpenModel, prompt: Pack, answer: dict[str, Any], reading: str) -> Followed:
    """Read a prompt and then the tokens of an answer to it.

    Args:
        answer: tokens and logprobs as vLLM gave them.
        reading: the result's name alone; the model computes as it is set to.
    """
    tokens = answer["tokens"]
    own, logprobs, behind = [], [], []
    decoding = model.decoding(prompt.num_tokens + len(tokens))
    logits_V = decoding.prefill(prompt)
    for token in tokens:
        logprobs_V = model.known(logits_V).log_softmax(-1)
        own.append(int(logprobs_V.argmax()))
        logprobs.append(float(logprobs_V[token]))
        behind.append(float(logprobs_V.max() - logprobs_V[token]))
        logits_V = decoding.push(token)
    gap = np.abs(np.array(logprobs) - np.array(answer["logprobs"]))
    equal = sum(mine == theirs for mine, theirs in zip(own, tokens, strict=True))
    return Followed(reading, equal, len(tokens), max(behind), float(gap.mean()), float(gap.max()))


def own_prompt(model: OpenModel, case: Case) -> Pack:
    """The question as this project reads it."""
    return prompt_of(model, case.question, case.reasoning)


def shown_prompt(model: OpenModel, case: Case, pixels: str) -> tuple[Pack, float]:
    """The same with vLLM's pixels, and how far they lie from ours at most, of 255.

    Args:
        pixels: file of the normalised tiles vLLM's encoder saw (T, 3, S, S).

    Raises:
        ValueError: they are not as many as this project shows.
    """
    ours = own_prompt(model, case)
    if not case.visual:
        return ours, 0.0
    patches_PF = _patches(model, np.load(pixels, allow_pickle=False))
    if patches_PF.shape != ours.patches_PF.shape:
        raise ValueError(
            f"{case.name}: vLLM's encoder saw {patches_PF.shape[0]} patches, this project shows "
            f"{ours.patches_PF.shape[0]}"
        )
    apart = float((patches_PF - ours.patches_PF.float()).abs().max())
    return replace(ours, patches_PF=patches_PF), apart


def _patches(model: OpenModel, pixels_TCSS: NDArray[np.float32]) -> torch.Tensor:
    """Normalised tiles as patches on the 0..255 scale, float32 (P, F)."""
    encoder = model.module.vision_model
    shift, scale = (v.cpu().numpy() for v in (encoder.pixel_shift_C, encoder.pixel_scale_C))
    tiles_TCSS = pixels_TCSS * scale[:, None, None] + shift[:, None, None]
    return torch.from_numpy(patches_of(tiles_TCSS, model.config.model.encoder.patch_size))


def same_prompt(ours: Pack, theirs: list[int], case: Case, image: int) -> bool:
    """Whether both read the same tokens.

    Args:
        image: the token that stands for an embedding. Where embeddings are pruned, which frame they
            stand in is decided by the encoder, so there only their number is compared.
    """
    rows = [ours.tokens_L[: ours.num_tokens].tolist(), theirs]
    if case.evs_rate:
        rows = [[*(token for token in row if token != image), row.count(image)] for row in rows]
    return rows[0] == rows[1]

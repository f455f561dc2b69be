"""`mvl evaluate`: what a model can do on held-out data, as numbers that gates read.

A suite is a source of the data, or one of two questions about what the model looks at:

    SOURCE         SOURCE.loss, and SOURCE.exact_match where answers are short
    image_swap     image_swap.delta: how much the loss grows when every picture is another sample's
    frame_shuffle  frame_shuffle.delta: how much it grows when a video's frames change places

The laptop's ocr and qa stand in for OCRBench, its code for LiveCodeBench. exact_match is in percent
of the samples whose known answer has at most `SHORT_ANSWER` tokens; case and white space at the
ends do not count. A delta of about zero means that the model answers without looking.

Refuses a suite the data does not have. Costs a forward pass a sample, two for the deltas, and the
answers of exact_match; a laptop model takes seconds for all.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.infer.decode import Options, respond
from megatron_vl.infer.held_out import HeldOut, loss_of, read_held_out, with_media_of
from megatron_vl.infer.model import OpenModel

IMAGE_SWAP, FRAME_SHUFFLE = "image_swap", "frame_shuffle"
SHORT_ANSWER = 24
"""Longest known answer that is asked for word by word. [tokens]"""
_SEED = 1234


def sources_of(root: Path) -> list[str]:
    """The prepared sources under a data root that hold held-out samples."""
    return sorted(path.parent.name for path in root.glob("*/.nv-meta"))


def measure(model: OpenModel, suites: Sequence[str], *, limit: int) -> dict[str, float]:
    """Metrics of some suites, or of all the data allows where none is named.

    Args:
        limit: held-out samples of a source.

    Returns:
        Numbers by "suite.metric".

    Raises:
        ValueError: no such suite, or no sample of it fits.
        FileNotFoundError: the data is not there.
    """
    sources = sources_of(Path(model.config.data.root))
    known = [*sources, IMAGE_SWAP, FRAME_SHUFFLE]
    unknown = [suite for suite in suites if suite not in known]
    if unknown or not sources:
        raise ValueError(
            f"there is no suite {', '.join(unknown) or 'at all'} in the data at "
            f"{model.config.data.root}; it has {', '.join(known)}"
        )
    if limit < 1:
        raise ValueError(f"--limit is {limit}; the least is 1")
    wanted = list(dict.fromkeys(suites)) or known
    looking = {IMAGE_SWAP: "image", FRAME_SHUFFLE: "video"}
    needed = sources if set(wanted) & set(looking) else [s for s in sources if s in wanted]
    samples = {source: read_held_out(model, source, limit) for source in needed}
    found: dict[str, float] = {}
    for suite in wanted:
        if suite in samples:
            found |= _source(model, samples[suite])
            continue
        shown = [one for one in samples.values() if one.kinds == {looking[suite]}]
        if shown:
            change = _image_swap if suite == IMAGE_SWAP else _frame_shuffle
            found |= {f"{suite}.{name}": value for name, value in change(model, shown).items()}
        elif suites:
            raise ValueError(f"{suite} needs samples with one kind of picture, {looking[suite]}s")
    return found


def _source(model: OpenModel, samples: HeldOut) -> dict[str, float]:
    source = samples.source
    found = {f"{source}.loss": loss_of(model, samples.samples)}
    right = asked = 0
    for question in samples.questions:
        reference = question.reference or ""
        length = len(model.tokenizer.encode(reference))
        if length > SHORT_ANSWER:
            continue
        # Room for another spelling of the same answer, and for the end of the turn.
        said = respond(model, question, Options(max_new_tokens=2 * length + 4))
        asked += 1
        right += said.reply.strip().casefold() == reference.strip().casefold()
    if asked:
        found[f"{source}.exact_match"] = 100.0 * right / asked
    return found


def _image_swap(model: OpenModel, shown: Iterable[HeldOut]) -> dict[str, float]:
    """Every sample with the pictures of the one half-way round its source."""
    own, swapped = [], []
    for one in shown:
        half = len(one.samples) // 2
        for sample, other in zip(one.samples, one.samples[half:] + one.samples[:half], strict=True):
            changed = with_media_of(sample, other) if half else None
            if changed is not None:
                own.append(sample)
                swapped.append(changed)
    return _delta(loss_of(model, own), loss_of(model, swapped))


def _frame_shuffle(model: OpenModel, shown: Iterable[HeldOut]) -> dict[str, float]:
    samples = [sample for one in shown for sample in one.samples]
    generator = torch.Generator().manual_seed(_SEED)
    return _delta(loss_of(model, samples), loss_of(model, samples, partial(_shuffled, generator)))


def _shuffled(generator: torch.Generator, tiles: list[Tensor]) -> list[Tensor]:
    return [clip[torch.randperm(len(clip), generator=generator)] for clip in tiles]


def _delta(before: float, after: float) -> dict[str, float]:
    return {"delta": after - before, "loss": before}

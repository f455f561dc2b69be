"""Held-out samples of a source as a model reads them, and its loss on them.

A sample is fitted and encoded as in training, its videos pruned at the stage's lowest rate, and run
alone; samples that do not fit are left out. The loss is the training's, square-averaged over the
assistant turns of all samples together, so that it compares with what a run reports.

Cost: one forward pass a sample. Shapes: L tokens of a sample.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vl.data import chat
from megatron_vl.data.encode import encode_fitted
from megatron_vl.data.fit import Room, fit_sample, headers_of, shorten
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.data.store import Sample, SourceStore
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.question import Question, question_of
from megatron_vl.model.visual import visual_input

Change = Callable[[list[Tensor]], list[Tensor]]
"""From the pixels of a sample's pictures, in order, to those it is shown with."""


@dataclass(frozen=True)
class HeldOut:
    """The first held-out samples of a source that fit the model's sequence.

    Attributes:
        samples: with what the text of a long document keeps.
        questions: those that fit with all their tiles and frames, up to their first answer.
    """

    source: str
    samples: list[Sample]
    questions: list[Question]

    @property
    def kinds(self) -> set[str]:
        """Kinds of pictures they show: image, video."""
        return {part["type"] for s in self.samples for part in chat.visual_parts(s.messages)}


def read_held_out(model: OpenModel, source: str, limit: int) -> HeldOut:
    """The first held-out samples of a source.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: no such source, or none of the samples fits.
    """
    store = SourceStore(model.config.data.root, source, "val")
    try:
        samples = []
        for key in store.keys[:limit]:
            sample = store.sample(key)
            media = {p[p["type"]]: d for p, d in _media_of(sample)}
            samples.append(Sample(key, source, sample.messages, media.__getitem__))
    finally:
        store.close()
    room = _room(model)
    fitting, questions = [], []
    for sample in samples:
        fitted = fit_sample(sample, headers_of(sample), model.tokenizer, room)
        if fitted.length == 0:
            continue
        kept = replace(sample, messages=shorten(sample.messages, fitted.kept_characters))
        fitting.append(kept)
        if fitted.limits == room.limits:
            questions.append(question_of(kept.messages, kept.media()))
    if not fitting:
        raise ValueError(
            f"none of the first {limit} held-out samples of {source} fits the model's "
            f"{model.config.data.sequence_length} tokens"
        )
    return HeldOut(source, fitting, questions)


def _room(model: OpenModel) -> Room:
    """The stage's, with videos pruned at its lowest rate."""
    room = Room.of(model.config)
    lowest = (min(room.video.evs_rate),)
    return replace(room, video=replace(room.video, evs_rate=lowest))


def _media_of(sample: Sample) -> Iterator[tuple[dict[str, Any], bytes]]:
    for part in chat.visual_parts(sample.messages):
        yield dict(part), sample.read_media(part[part["type"]])


def encode(model: OpenModel, sample: Sample, change: Change | None = None) -> Pack | None:
    """A sample as a pack of one document; None where it does not fit."""
    room = _room(model)
    fitted = fit_sample(sample, headers_of(sample), model.tokenizer, room)
    if fitted.length == 0:
        return None
    document, tiles = encode_fitted(sample, fitted, model.tokenizer, room)
    return make_pack(
        [document],
        change(tiles) if change else tiles,
        [sample.key],
        length=len(document),
        patch_size=room.patch_size,
        pad_token=model.tokenizer.pad_id,
    )


@torch.no_grad()
def token_losses(model: OpenModel, pack: Pack) -> Tensor:
    """Loss of each token (L,), float32."""
    device = PLATFORM.device
    documents = packed_sequence(
        pack.document_ids_L, pack.cu_seqlens, pack.max_document_length, device
    )
    losses_BL = model.module(
        pack.tokens_L.to(device).unsqueeze(0),
        visual_input(pack, device),
        documents,
        labels_BL=pack.labels_L.to(device).unsqueeze(0),
    )
    return losses_BL[0].float().cpu()


def loss_of(model: OpenModel, samples: Iterable[Sample], change: Change | None = None) -> float:
    """Square-averaged loss over samples; those that no longer fit once changed are left out.

    Raises:
        ValueError: nothing is left.
    """
    total = weight = 0.0
    for sample in samples:
        pack = encode(model, sample, change)
        if pack is None:
            continue
        total += float((token_losses(model, pack) * pack.loss_weights_L).sum(dtype=torch.float64))
        weight += pack.weight_total
    if weight == 0:
        raise ValueError("no held-out sample with a supervised token fits the model's sequence")
    return total / weight


def with_media_of(sample: Sample, other: Sample) -> Sample | None:
    """A sample shown with another's pictures; None where they differ in number or kind."""
    own, others = (list(_media_of(s)) for s in (sample, other))
    if [part["type"] for part, _ in own] != [part["type"] for part, _ in others]:
        return None
    media = [data for _, data in others]
    # Sizes stated in the row belong to the pictures it came with.
    messages = [
        {**message, "content": _unstated(message["content"])} for message in sample.messages
    ]
    names = [part[part["type"]] for part, _ in own]
    return Sample(
        sample.key, sample.source, messages, dict(zip(names, media, strict=True)).__getitem__
    )


def _unstated(content: str | Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{k: v for k, v in part.items() if k != "metadata"} for part in content]

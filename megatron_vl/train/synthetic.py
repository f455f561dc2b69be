"""Packs made up from a seed, without any data on disk: for checks and benches of a layout.

A pack is filled with documents of random tokens in a fixed cycle of kinds: an image in tiles, an
image at its own odd resolution, a video that keeps half its second scene (so that frames keep all,
some and none of their embeddings), and text whose assistant turns are long enough to lie in several
context shards. Every fourth pack, from the second, is text alone. Pack n is the same whatever rank
makes it.

Costs one random draw of every pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.sequence.layout import UNSUPERVISED, Document, aligned
from megatron_vl.sequence.visual import ImageSpan, PatchGrid, VideoSpan

LABEL, TAGS, ANSWER = 3, 1, 12
"""Tokens of a frame's label, of a tag, and of the answer behind a picture."""

FRAMES = 4


class Kind(Enum):
    """What a document holds."""

    text = "text"
    tiles = "tiles"
    native = "native"
    video = "video"


@dataclass(frozen=True)
class Sample:
    """A document and its pictures, uint8 (T, 3, H, W) stacks in the order of its units."""

    document: Document
    pictures: tuple[Tensor, ...] = ()


def synthetic_packs(
    config: StageConfig,
    step: int,
    *,
    rank: int = 0,
    size: int = 1,
    kinds: Sequence[Kind] = tuple(Kind),
) -> list[Pack]:
    """This data-parallel rank's packs of one global batch.

    Args:
        rank, size: of the data-parallel group.
        kinds: what to put into packs that are not text alone.

    Raises:
        ValueError: data.sequence_length has no room for one document of each kind.
    """
    batch = config.train.global_batch
    return [
        pack_of(config, samples_of(config, number, kinds), name=f"synthetic/{number}")
        for number in range(step * batch + rank, (step + 1) * batch, size)
    ]


def pack_of(config: StageConfig, samples: Sequence[Sample], *, name: str) -> Pack:
    """A pack of samples at the stage's length and alignment."""
    return make_pack(
        [sample.document for sample in samples],
        [picture for sample in samples for picture in sample.pictures],
        [f"{name}/{i}" for i in range(len(samples))],
        length=config.data.sequence_length,
        patch_size=config.model.encoder.patch_size,
        pad_token=0,
        alignment=config.data.document_alignment,
    )


def samples_of(
    config: StageConfig, number: int, kinds: Sequence[Kind] = tuple(Kind)
) -> list[Sample]:
    """The samples of pack `number`; they leave a little padding.

    Raises:
        ValueError: see `synthetic_packs`.
    """
    draw = _Draw(config, number)
    wanted = (Kind.text,) if number % 4 == 1 else tuple(kinds)
    free = config.data.sequence_length - config.data.document_alignment
    samples: list[Sample] = []
    for kind in cycle(wanted):
        sample = draw.sample(kind)
        taken = aligned(len(sample.document), config.data.document_alignment)
        if taken > free:
            break
        samples.append(sample)
        free -= taken
    if len(samples) < len(wanted):
        raise ValueError(
            f"data.sequence_length is {config.data.sequence_length}, which has no room for one "
            f"synthetic document of each kind ({', '.join(kind.value for kind in wanted)}); it "
            f"lacks {taken - free} tokens for the next one"
        )
    return samples


class _Draw:
    """Draws the documents of one pack."""

    def __init__(self, config: StageConfig, number: int) -> None:
        self.config = config
        self.random = np.random.default_rng([config.train.seed, number])
        edge = config.data.tile_size // config.model.encoder.patch_size
        largest = config.model.encoder.position_grid
        self.tile = PatchGrid(edge, edge)
        self.odd = PatchGrid(max(1, edge - 3), min(edge + 1, largest))

    def sample(self, kind: Kind) -> Sample:
        """One document of a kind."""
        if kind is Kind.text:
            return self._text()
        if kind is Kind.video:
            return self._video()
        grids = [self.tile, self.tile] if kind is Kind.tiles else [self.odd]
        tokens = sum(grid.tokens for grid in grids)
        turns = self._turns(LABEL + TAGS, tokens + TAGS, ANSWER)
        span = ImageSpan(start=LABEL + TAGS, grids=tuple(grids))
        document = Document(self._tokens(len(turns)), turns, (span,))
        return Sample(document, (self._pixels(len(grids), grids[0]),))

    def _text(self) -> Sample:
        """Two turns, the first of most of the document, with a question before each."""
        length = max(self.config.data.sequence_length // 6, 4 * ANSWER)
        length -= int(self.random.integers(0, ANSWER))
        turns = self._turns(LABEL, 0, length * 3 // 4)
        rest = self._turns(LABEL, 0, length - LABEL - len(turns))
        rest[rest != UNSUPERVISED] += 1
        turns = np.concatenate([turns, rest])
        return Sample(Document(self._tokens(len(turns)), turns))

    def _video(self) -> Sample:
        """Frames 0 and 1 are alike; the upper half of frame 2 is new; frame 3 is frame 2 again."""
        rows = -(-self.tile.rows // 4) * 2
        pixels = self._pixels(FRAMES, self.tile)
        edge = self.config.model.encoder.patch_size
        pixels[1] = pixels[0]
        pixels[2, :, rows * edge :] = pixels[0, :, rows * edge :]
        pixels[3] = pixels[2]
        span = VideoSpan(
            start=LABEL,
            grid=self.tile,
            before_F=(LABEL + TAGS,) * FRAMES,
            after_F=(TAGS,) * (FRAMES - 1) + (TAGS + 1,),
            kept=self.tile.tokens + PatchGrid(rows, self.tile.columns).tokens,
        )
        turns = self._turns(LABEL, span.length, ANSWER)
        document = Document(self._tokens(len(turns)), turns, (span,))
        return Sample(document, (pixels,))

    def _turns(self, before: int, shown: int, answer: int) -> NDArray[np.int32]:
        """Turn ids: what the user says and shows, then an answer."""
        return np.concatenate(
            [np.full(before + shown, UNSUPERVISED), np.zeros(answer, dtype=np.int64)]
        ).astype(np.int32)

    def _tokens(self, length: int) -> NDArray[np.int64]:
        return self.random.integers(0, self.config.model.vocab_size, length)

    def _pixels(self, units: int, grid: PatchGrid) -> Tensor:
        edge = self.config.model.encoder.patch_size
        shape = (units, 3, grid.rows * edge, grid.columns * edge)
        return torch.from_numpy(self.random.integers(0, 256, shape, dtype=np.uint8))

"""Packs for the trainer, decoded ahead.

`PackLoader` reads a stage's blend, plans the packs (`plan.py`) and decodes this data-parallel
rank's share of each global batch in a thread. Its whole state is `cursor`, the number of packs all
ranks have consumed: a loader opened at a cursor gives the same packs, bit for bit, at any rank
count.

Threads, not processes: image decoding and resizing release the interpreter, and nothing forks under
a running process group. `encode_prompt` and `held_out_examples` serve generation.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import chat
from megatron_vl.data.fit import Fitted, Room, fit_source, shorten
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.data.plan import PackPlan, PlanSample
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.store import SourceStore, missing_root, open_sources
from megatron_vl.data.tiling import image_size, tile_image
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.sequence.layout import Document


def load_tokenizer(config: StageConfig) -> Tokenizer:
    """The tokenizer beside a stage's data.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: its size is not the model's.
    """
    root = Path(config.data.root)
    if not root.is_dir():
        raise missing_root(root)
    tokenizer = Tokenizer.load(root / TOKENIZER_FILE)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{root / TOKENIZER_FILE} has {tokenizer.vocab_size} entries, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size} or "
            "prepare the data again"
        )
    return tokenizer


class PackLoader:
    """This rank's packs of each global batch.

    Args:
        split: train or val.
        rank, size: of the data-parallel group.
        cursor: packs consumed so far, over all ranks.

    Attributes:
        cursor: packs consumed, over all ranks.
        dropped: samples of each source that fit no sequence.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: train.global_batch is no multiple of size, or the blend names no such source.
    """

    def __init__(
        self, config: StageConfig, *, split: str, rank: int, size: int, cursor: int = 0
    ) -> None:
        batch = config.train.global_batch
        if batch % size:
            nearest = max(1, round(batch / size)) * size
            raise ValueError(
                f"train.global_batch is {batch} for {size} data-parallel ranks; it must be a "
                f"multiple of their number, the nearest is {nearest}"
            )
        assert 0 <= rank < size
        assert cursor >= 0
        self.cursor = cursor
        self.dropped: dict[str, int] = {}
        self._rank, self._size, self._batch = rank, size, batch
        self._tokenizer = load_tokenizer(config)
        self._room = Room.of(config)
        blend = {source: weight for source, weight in config.data.blend.items() if weight}
        self._stores = open_sources(config.data.root, sorted(blend), split)
        self._fitted: dict[tuple[str, str], Fitted] = {}
        self._plan = PackPlan(
            self._plan_samples(),
            blend,
            sequence_length=config.data.sequence_length,
            window=config.data.packing_window,
            seed=config.train.seed,
            packing=config.data.packing,
        )
        self._ahead = max(0, config.data.prefetch)
        self._next_cursor = cursor
        self._waiting: deque[Future[list[Pack]]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packs")
        self._fill()

    def _plan_samples(self) -> list[PlanSample]:
        """The samples that fit; the others are counted in `dropped`."""
        samples = []
        for source, store in self._stores.items():
            self.dropped[source] = 0
            for fitted in fit_source(store, self._tokenizer, self._room):
                if fitted.length == 0:
                    self.dropped[source] += 1
                    continue
                self._fitted[source, fitted.key] = fitted
                samples.append(PlanSample(fitted.key, source, fitted.length, fitted.tiles))
        return samples

    def _fill(self) -> None:
        """Ask the thread for as many global batches as are to be decoded ahead."""
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._worker.submit(self._decode_batch, self._next_cursor))
            self._next_cursor += self._batch

    def next_batch(self) -> list[Pack]:
        """This rank's packs of the next global batch: packs cursor + rank, cursor + rank + size,
        ...

        Raises:
            RuntimeError: a sample cannot be decoded; the message names its key.
        """
        if self._waiting:
            packs = self._waiting[0].result()
            self._waiting.popleft()
        else:
            packs = self._decode_batch(self._next_cursor)
            self._next_cursor += self._batch
        self.cursor += self._batch
        self._fill()
        return packs

    def _decode_batch(self, cursor: int) -> list[Pack]:
        numbers = range(cursor + self._rank, cursor + self._batch, self._size)
        return [self._decode_pack(self._plan[number]) for number in numbers]

    def _decode_pack(self, members: Sequence[PlanSample]) -> Pack:
        documents: list[Document] = []
        tiles: list[Tensor] = []
        for member in members:
            try:
                store = self._stores[member.source]
                fitted = self._fitted[member.source, member.key]
                document, images = encode_sample(store, fitted, self._tokenizer, self._room)
            except Exception as error:
                raise RuntimeError(
                    f"sample {member.key} of source {member.source} cannot be decoded: {error}"
                ) from error
            documents.append(document)
            tiles += images
        return make_pack(
            documents,
            tiles,
            [member.key for member in members],
            length=self._room.sequence_length,
            tile_size=self._room.tile_size,
            pad_token=self._tokenizer.pad_id,
        )

    def close(self) -> None:
        """Stop the thread and close the sources; the loader cannot be used afterwards."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
        for store in self._stores.values():
            store.close()


def encode_sample(
    store: SourceStore, fitted: Fitted, tokenizer: Tokenizer, room: Room
) -> tuple[Document, list[Tensor]]:
    """A sample as it was fitted: its document, and the tiles of each image, (T, 3, S, S) uint8.

    Raises:
        ValueError: its images or its length are not what the tables said.
    """
    sample = store.sample(fitted.key)
    tiles = [
        tile_image(data, tile_size=room.tile_size, max_tiles=fitted.max_tiles)
        for data in sample.images()
    ]
    document = chat.encode_conversation(
        shorten(sample.messages, fitted.kept_characters),
        tokenizer,
        [len(image) * room.tokens_per_tile for image in tiles],
    )
    if len(document) != fitted.length:
        raise ValueError(
            f"it has {len(document)} tokens, the length table says {fitted.length}: an image's "
            "size differs from its metadata"
        )
    return document, tiles


def encode_prompt(
    config: StageConfig,
    messages: Sequence[dict[str, Any]],
    images: Sequence[bytes],
    reasoning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A conversation up to and with the opening of the answer to generate.

    Args:
        messages: v2 form; image parts take the images in order.
        images: encoded images.
        reasoning: whether the answer starts with a trace, unless a message says /think or
        /no_think.

    Returns:
        tokens (L) int64, tiles (T, 3, S, S) uint8, visual positions (V) int64.

    Raises:
        ValueError: image parts and images differ in number, or an image cannot be read.
    """
    tokenizer, room = load_tokenizer(config), Room.of(config)
    counts = room.image_tokens([image_size(data) for data in images], room.max_tiles)
    document = chat.encode_conversation(
        messages, tokenizer, counts, add_generation_prompt=True, reasoning=reasoning
    )
    empty = torch.empty((0, 3, room.tile_size, room.tile_size), dtype=torch.uint8)
    tiles = [
        tile_image(data, tile_size=room.tile_size, max_tiles=room.max_tiles) for data in images
    ]
    return (
        torch.from_numpy(document.tokens_N),
        torch.cat([empty, *tiles]),
        torch.from_numpy(document.visual_positions_V),
    )


def held_out_examples(
    config: StageConfig, source: str, n: int
) -> list[tuple[list[dict[str, Any]], list[bytes]]]:
    """The first n held-out conversations of a source, each with its encoded images.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: no such source.
    """
    store = SourceStore(config.data.root, source, "val")
    samples = [store.sample(key) for key in store.keys[:n]]
    examples = [(sample.messages, sample.images()) for sample in samples]
    store.close()
    return examples

"""Measure the loader: packs a second, what it costs without pixels, where the time goes.

    python bench/loader.py                  # photographs of 1600x1200 and others, packs of 16384
    python bench/loader.py --quick          # fewer samples

Builds a data set of photographs (noise with a photograph's spectrum, JPEG), pages (PNG) and text in
a temporary folder, then reads packs at the published tile size of 512. Seconds by stage are thread
time; packs a second are wall time, which other work on the machine lengthens.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data import encode as encode_room
from megatron_vl.data import lengths as lengths_room
from megatron_vl.data import loader as loader_room
from megatron_vl.data.index import index_source
from megatron_vl.data.laptop_material import RawSample
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.prepare import prepare_laptop, sample_members, write_shard
from megatron_vl.data.store import SourceStore

STAGE = Path(__file__).parents[1] / "stages" / "laptop" / "stage1.yaml"
PHOTOGRAPHS = ((1600, 1200), (1536, 1024), (1280, 720), (640, 480))
PAGES = ((1240, 1754), (850, 1100))
BATCH = 4
PACKS = 24


def picture(random: np.random.Generator, size: tuple[int, int], kind: str) -> bytes:
    """A photograph as JPEG, or a page of grey lines as PNG."""
    width, height = size
    stream = io.BytesIO()
    if kind == "jpg":
        falling = 1 / np.maximum(
            np.hypot(np.fft.fftfreq(width)[None, :], np.fft.fftfreq(height)[:, None]),
            1 / max(width, height),
        )
        spectrum = np.fft.fft2(random.standard_normal((height, width))) * falling
        grey = np.fft.ifft2(spectrum).real
        pixels = np.clip(128 + 50 * grey / grey.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(stream, "JPEG", quality=90)
    else:
        page = np.full((height, width), 255, dtype=np.uint8)
        for top in range(40, height - 40, 24):
            for left in range(40, width - 60, 12):
                page[top : top + 14, left : left + random.integers(4, 10)] = 30
        Image.fromarray(page).save(stream, "PNG")
    return stream.getvalue()


def build(root: Path, count: int) -> None:
    """Sources photos, pages and prose, and a tokenizer, under root."""
    stage, sizes = config_for(root), {"text": 8, "code": 8}
    prepare_laptop(stage.data, stage.model, seed=1, sizes=sizes, progress=lambda line: None)
    random = np.random.default_rng(0)
    words = Path(np.__file__).read_text(encoding="utf-8").split()
    photographs = [picture(random, size, "jpg") for size in PHOTOGRAPHS]
    pages = [picture(random, size, "png") for size in PAGES]

    def sample(images: list[tuple[str, bytes]], question: int, answer: int) -> RawSample:
        asked = [{"type": "text", "text": " ".join(random.choice(words, question))}]
        told = [{"type": "text", "text": " ".join(random.choice(words, answer))}]
        return RawSample(
            [
                {"role": "user", "content": [{"type": "image"} for _ in images] + asked},
                {"role": "assistant", "content": told},
            ],
            images,
        )

    makers: dict[str, Callable[[int], RawSample]] = {
        "photos": lambda at: sample([("jpg", photographs[at % len(photographs)])], 8, 60),
        "pages": lambda at: sample([("png", pages[at % len(pages)])], 8, 300),
        "prose": lambda at: sample([], 40, int(random.integers(50, 900))),
    }
    for source, make in makers.items():
        (root / source).mkdir()
        for split, size in (("train", count), ("val", 8)):
            members = (
                member
                for at in range(size)
                for member in sample_members(f"{source}_{split}_{at:06d}", source, make(at))
            )
            write_shard(root / source / f"{split}-000.tar", members)
        index_source(root / source)


def config_for(root: Path) -> StageConfig:
    """Packs of 16384 tokens, published tiles; of the model only sizes are used."""
    overrides = [
        f"data.root={root}",
        "data.blend={photos: 5, pages: 2, prose: 3}",
        "data.sequence_length=16384",
        "data.tile_size=512",
        "data.packing_window=5000",
        "data.max_samples_per_pack=0",
        "data.max_tiles_per_pack=0",
        "model.encoder.patch_size=16",
        f"train.global_batch={BATCH}",
    ]
    return load_stage(STAGE, overrides)


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Thread seconds of each stage of decoding, nested ones counted where they are innermost."""
    spent: dict[str, float] = defaultdict(float)
    local = threading.local()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            inside = local.__dict__.setdefault("inside", [])
            inside.append(0.0)
            started = time.thread_time()
            try:
                return function(*args, **settings)
            finally:
                took = time.thread_time() - started
                spent[name] += took - inside.pop()
                if inside:
                    inside[-1] += took

        return run

    stages = (
        (SourceStore, "sample", "read and parse the row"),
        (SourceStore, "_read", "read from the tar"),
        (encode_room, "headers_of", "headers"),
        (encode_room.chat, "encode_conversation", "template and tokens"),
        (encode_room, "decode_image", "decode the image"),
        (encode_room, "cut_tiles", "resize and cut"),
        (loader_room, "make_pack", "lay out the pack"),
        (loader_room, "encode_sample", "rest of a sample"),
        (PackLoader, "_submit", "plan and hand out"),
        (PackLoader, "_decode_pack", "rest of a pack"),
    )
    with contextlib.ExitStack() as patches:
        for owner, name, label in stages:
            patches.enter_context(mock.patch.object(owner, name, wrap(label, getattr(owner, name))))
        yield spent


def no_pixels(data: bytes, header: Any, visual: Any, max_tiles: int, room: Any) -> torch.Tensor:
    """Stands where an image would be decoded: the same shape, nothing in it."""
    return torch.zeros((len(visual), 3, room.tile_size, room.tile_size), dtype=torch.uint8)


def read(config: StageConfig, packs: int = PACKS) -> tuple[float, float, int, int]:
    """Wall and process seconds of some packs, their tokens and tiles; the first batch is not
    counted."""
    loader = PackLoader(config, split="train", rank=0, size=1)
    loader.next_batch()
    wall, process = time.perf_counter(), time.process_time()
    tokens = tiles = 0
    for _ in range(packs // BATCH):
        for pack in loader.next_batch():
            tokens += pack.num_tokens
            tiles += len(pack.grids)
    seconds = time.perf_counter() - wall, time.process_time() - process
    loader.close()
    return *seconds, tokens, tiles


def throughput(config: StageConfig) -> None:
    """Packs a second by threads, with and without pixels."""
    print(f"\n{'':26}{'packs/s':>9}{'tiles/s':>9}{'tokens/s':>10}{'CPU ms/pack':>13}{'fill':>7}")
    for label, workers, pixels in (
        ("1 thread", 1, True),
        ("2 threads", 2, True),
        ("1 thread, without pixels", 1, False),
    ):
        chosen = replace(config, data=replace(config.data, workers=workers, prefetch=2))
        with contextlib.ExitStack() as patches:
            if not pixels:
                patches.enter_context(mock.patch.object(encode_room, "_pixels", no_pixels))
            wall, process, tokens, tiles = min(read(chosen) for _ in range(3))
        print(
            f"{label:26}{PACKS / wall:9.2f}{tiles / wall:9.0f}{tokens / wall:10.0f}"
            f"{1e3 * process / PACKS:13.1f}{tokens / PACKS / 16384:7.3f}"
        )


def stages(config: StageConfig) -> None:
    """Where the thread time of a pack goes."""
    with timed() as spent:
        read(replace(config, data=replace(config.data, prefetch=0)))
    whole = sum(spent.values())
    packs = PACKS + BATCH
    print(f"\n{'stage':26}{'ms a pack':>10}{'share':>8}")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:26}{1e3 * seconds / packs:10.2f}{seconds / whole:8.1%}")
    print(f"{'all':26}{1e3 * whole / packs:10.2f}")


def openings(config: StageConfig, count: int) -> None:
    """Length tables, and starting in the middle of a window of 5000 samples."""
    lengths = Path(config.data.root) / "lengths"
    shutil.rmtree(lengths, ignore_errors=True)
    started = time.perf_counter()
    lengths_room.build_length_tables(config, progress=lambda line: None)
    seconds = time.perf_counter() - started
    rows = 3 * (count + 8)
    print(f"length tables of {rows} samples: {seconds:.1f} s, {rows / seconds:.0f} samples/s")
    decoded: list[bytes] = []
    decode = encode_room.decode_image

    def counting(data: bytes) -> Any:
        decoded.append(data)
        return decode(data)

    alone = replace(config, data=replace(config.data, prefetch=0))
    with mock.patch.object(encode_room, "decode_image", counting):
        started = time.perf_counter()
        loader = PackLoader(alone, split="train", rank=0, size=1, cursor=100 * BATCH)
        opened, before = time.perf_counter() - started, len(decoded)
        loader.next_batch()
        first = time.perf_counter() - started
        loader.close()
    print(
        f"opened at pack {100 * BATCH}, in a window of {config.data.packing_window} samples: "
        f"{opened:.2f} s with {before} images decoded, first batch after {first:.2f} s"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    count = 300 if parser.parse_args().quick else 1500
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        build(root, count)
        config = config_for(root)
        openings(config, count)
        throughput(config)
        stages(config)


if __name__ == "__main__":
    main()

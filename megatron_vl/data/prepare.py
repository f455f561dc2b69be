"""`mvl data prepare`: build the data sets and the tokenizer a recipe reads.

The laptop builder writes, under data.root,

    SOURCE/{train,val}-000.tar    members KEY.json and KEY.0.jpg, .png or .mp4, prepared for energon
    tokenizer/tokenizer.json      a byte-level BPE of model.vocab_size entries, or data.tokenizer
    prepared.json                 written last: what was built, from which inputs

Everything is built in a folder beside data.root and renamed into place, so data.root is either
whole or absent. A second call with the same inputs does nothing; data.root holding something else
is refused unless forced. A quarter of a minute and 35 MB for the laptop recipe.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.data import documents, laptop_text, pictures
from megatron_vl.data.headers import probe
from megatron_vl.data.index import index_source
from megatron_vl.data.laptop_material import RawSample
from megatron_vl.data.laptop_sources import DEFAULT_SIZES, held_out_count, source_samples
from megatron_vl.data.marker import MARKER, builder_digest, read_marker
from megatron_vl.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER_FILE = "tokenizer/tokenizer.json"

Progress = Callable[[str], None]


def prepare_recipe(
    folder: Path | str,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    progress: Progress = print,
) -> Path:
    """Build the data of a recipe folder or stage file, and the tables of samples' lengths that its
    stages plan by; returns data.root.

    Args:
        overrides: `key=value` settings as the other commands take them.
        force: build again although data.root exists.
        progress: takes one line of text at a time.

    Raises:
        ValueError: the recipe's data is made elsewhere, its stages disagree about it, or data.root
            holds something else.
    """
    from megatron_vl.config.recipe import load_recipe
    from megatron_vl.data.lengths import build_length_tables

    stages = load_recipe(Path(folder), list(overrides))
    first = stages[0][2]
    for name, path, stage in stages[1:]:
        for key, mine, other in (
            ("data.root", stage.data.root, first.data.root),
            ("data.builder", stage.data.builder, first.data.builder),
            ("data.tokenizer", stage.data.tokenizer, first.data.tokenizer),
            ("data.tile_size", stage.data.tile_size, first.data.tile_size),
            ("model.vocab_size", stage.model.vocab_size, first.model.vocab_size),
        ):
            if mine != other:
                raise ValueError(
                    f"{path}: {key} is {mine!r} in {name} and {other!r} in {stages[0][0]}; one "
                    "data set serves the whole recipe, so set it in base.yaml"
                )
    if first.data.builder == "none":
        raise ValueError(
            f"{folder}: data.builder is none, so {first.data.root} is made elsewhere; "
            "the builder here is laptop"
        )
    if first.data.builder != "laptop":
        raise ValueError(f"{folder}: no data.builder {first.data.builder!r}; use laptop or none")
    root = prepare_laptop(
        first.data, first.model, seed=first.train.seed, force=force, progress=progress
    )
    for _, _, stage in stages:
        if stage.data.blend:
            build_length_tables(stage, progress=progress)
    return root


def prepare_laptop(
    data: DataConfig,
    model: ModelConfig,
    *,
    seed: int,
    sizes: Mapping[str, int] = DEFAULT_SIZES,
    force: bool = False,
    progress: Progress = print,
) -> Path:
    """Build the laptop's data sets and tokenizer under data.root; returns data.root.

    Args:
        sizes: training samples of each source; held-out samples follow from them.

    Raises:
        FileNotFoundError, ValueError: data.tokenizer is not the model's.
        ValueError: data.root exists with other contents and force is off.
    """
    root = Path(data.root)
    inputs = {
        "builder": "laptop",
        "code": builder_digest(),
        "seed": seed,
        "sizes": dict(sizes),
        "tile_size": data.tile_size,
        "tokenizer": _released_tokenizer(data, model),
        "vocab_size": model.vocab_size,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    found = read_marker(root)
    if found is not None and found["digest"] == digest and not force:
        progress(f"{root}: already prepared ({found['samples']} samples), nothing to do")
        return root
    if found is None and root.exists() and any(root.iterdir()) and not force:
        raise ValueError(
            f"{root} holds files that were not made by this command; give another data.root, empty "
            "it, or use --force to replace it"
        )
    started = time.monotonic()
    root.parent.mkdir(parents=True, exist_ok=True)
    building = root.with_name(f".{root.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    counts = {
        source: _write_source(building / source, source, size, seed, data.tile_size, progress)
        for source, size in sizes.items()
    }
    tokenizer = building / TOKENIZER_FILE
    tokenizer.parent.mkdir()
    if data.tokenizer:
        progress(f"tokenizer: {data.tokenizer}")
        shutil.copyfile(data.tokenizer, tokenizer)
    else:
        progress(f"tokenizer: training {model.vocab_size} entries")
        train_tokenizer(_tokenizer_corpus(), vocab_size=model.vocab_size, path=tokenizer)
    marker = {
        "digest": digest,
        "inputs": inputs,
        "sources": counts,
        "samples": sum(sum(split.values()) for split in counts.values()),
    }
    (building / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    _replace(root, building)
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    progress(
        f"{root}: {marker['samples']} samples, {size / 1e6:.0f} MB, "
        f"{time.monotonic() - started:.0f} s"
    )
    return root


def _released_tokenizer(data: DataConfig, model: ModelConfig) -> str:
    """Digest of the released tokenizer; empty where one is trained.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not the model's.
    """
    if not data.tokenizer:
        return ""
    path = Path(data.tokenizer)
    if not path.is_file():
        raise FileNotFoundError(2, "data.tokenizer names no file", data.tokenizer)
    content = path.read_bytes()
    entries = Tokenizer(content.decode()).vocab_size
    if entries != model.vocab_size:
        raise ValueError(
            f"data.tokenizer {data.tokenizer} has {entries} entries, model.vocab_size is "
            f"{model.vocab_size}; set model.vocab_size={entries}, or data.tokenizer= to train one"
        )
    return hashlib.sha256(content).hexdigest()[:16]


def _replace(root: Path, building: Path) -> None:
    """Put the finished folder in place of the old one."""
    old = root.with_name(f".{root.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if root.exists():
        os.rename(root, old)
    os.rename(building, root)
    shutil.rmtree(old, ignore_errors=True)


def sample_members(key: str, source: str, sample: RawSample) -> Iterator[tuple[str, bytes]]:
    """Tar members of a sample: KEY.json in v2 form, then its media, named as the row names them."""
    waiting = iter(
        [(f"{key}.{index}.{kind}", data) for index, (kind, data) in enumerate(sample.media)]
    )
    media: list[tuple[str, bytes]] = []
    messages: list[dict[str, Any]] = []
    for message in sample.messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            if kind != "text":
                name, data = next(waiting)
                media.append((name, data))
                part = {**part, kind: name, "metadata": probe(kind, data).metadata()}
            parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    row = {"id": key, "source": source, "messages": messages}
    yield f"{key}.json", json.dumps(row, ensure_ascii=False).encode()
    yield from media


def write_shard(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """A tar file of members without times or owners: equal members, equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_source(
    folder: Path, source: str, size: int, seed: int, tile_size: int, progress: Progress
) -> dict[str, int]:
    """Write and index one source; returns its samples by split."""
    folder.mkdir()
    counts = {"train": size, "val": held_out_count(size)}
    started = time.monotonic()
    for split, count in counts.items():
        samples = source_samples(source, split=split, count=count, seed=seed, tile_size=tile_size)
        members = (
            member
            for index, sample in enumerate(samples)
            for member in sample_members(f"{source}_{split}_{index:06d}", source, sample)
        )
        write_shard(folder / f"{split}-000.tar", members)
    index_source(folder)
    progress(
        f"{source}: {counts['train']} training and {counts['val']} held-out samples, "
        f"{time.monotonic() - started:.1f} s"
    )
    return counts


def _tokenizer_corpus() -> Iterator[str]:
    """Training text of the tokenizer: the same material, and the words every conversation has."""
    frame = "System\n\nUser\nAssistant\n<think></think>Assistant\n<think>\n</think>\n\n"
    yield from [frame] * 2000
    yield from ["\nFrame 1 sampled at 0.25 seconds: "] * 500
    for photograph in pictures.PHOTOGRAPHS:
        yield from [f"{photograph.name}. The picture shows {photograph.subject}."] * 30
    for sample in source_samples("captions", split="train", count=100, seed=0, tile_size=8):
        for message in sample.messages:
            yield from [message["content"][-1]["text"]] * 5
    yield from documents.paragraphs("train")
    for function in documents.functions("train"):
        yield function.summary
        if len(function.body) <= laptop_text.SHORT_CODE[1]:
            yield function.body

"""`mvl data validate`: every row and medium of prepared sources, looked at.

Found are rows that are no conversation, turns that say nothing or leave nothing to train on, media
that are missing, broken, cut off or not of the size their row says, files that no row shows, and
samples with the same text and media, within a split or over the two. `decode_all` decodes every
image as the trainer does and every frame of every video. Findings name the sample's key.

Cost: reading everything once, about 0.5 ms a sample and worker; with decode_all the decoding.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vl.data.chat import split_trace
from megatron_vl.data.convert.conversation import Fault, Reason
from megatron_vl.data.convert.parts import read_v2
from megatron_vl.data.headers import open_video, probe
from megatron_vl.data.store import Sample, SourceStore
from megatron_vl.data.tiling import decode_image
from megatron_vl.data.view import Span, close_opened, opened, spans_of
from megatron_vl.data.workers import advance, each

Tell = Callable[[str, int, int], None]

_SPAN = 100
_SIZES = ("width", "height", "video_width", "video_height", "video_num_frames")
WRONG_SIZE = "size differs from its row"
UNSHOWN = "medium no row shows"
DUPLICATE = "duplicate sample"
UNREADABLE_ROW = "unreadable row"


@dataclass(frozen=True)
class Trouble:
    """Something wrong with one sample."""

    source: str
    split: str
    key: str
    reason: str
    detail: str

    def text(self) -> str:
        """The finding as one line."""
        return f"{self.source}/{self.split}: {self.key}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Looked:
    """What was found in some samples, and a digest of the content of each."""

    troubles: list[Trouble]
    contents: list[tuple[bytes, str]]


def validate(
    folders: Iterable[Path],
    *,
    decode_all: bool = False,
    workers: int = 1,
    tell: Tell = lambda doing, done, total: None,
) -> tuple[int, list[Trouble]]:
    """Check sources; returns how many samples were looked at, and what is wrong, in order.

    Raises:
        ValueError: a source without samples.
    """
    spans = [span for folder in folders for span in spans_of(folder, _SPAN)]
    total = sum(len(span.places) for span in spans)
    troubles: list[Trouble] = []
    contents: dict[bytes, tuple[str, str]] = {}
    source = ""
    parts = each(
        partial(_look, decode_all),
        spans,
        workers=workers,
        tell=lambda done: tell("looking at samples", done, total),
    )
    for span, part in zip(spans, parts, strict=True):
        if span.folder != source:
            source, contents = span.folder, {}
        troubles += part.troubles
        troubles += _duplicates(span, part.contents, contents)
    close_opened()
    return total, troubles


def _duplicates(
    span: Span, contents: Iterable[tuple[bytes, str]], seen: dict[bytes, tuple[str, str]]
) -> Iterator[Trouble]:
    """Samples whose content was seen before; notes the others as seen."""
    for digest, key in contents:
        split, first = seen.setdefault(digest, (span.split, key))
        if first != key:
            where = f"{first} of {split} says and shows the same"
            yield Trouble(Path(span.folder).name, span.split, key, DUPLICATE, where)


def _look(decode_all: bool, span: Span) -> Looked:
    """Check some samples."""
    store = opened(span.folder, span.split)
    troubles: list[Trouble] = []
    contents: list[tuple[bytes, str]] = []
    for key in span.keys(store):
        advance()
        found: list[tuple[str, str]] = []
        digest = _check_sample(store, key, decode_all, found)
        if digest is not None:
            contents.append((digest, key))
        troubles += [Trouble(store.source, store.split, key, *trouble) for trouble in found]
    return Looked(troubles, contents)


def _check_sample(
    store: SourceStore, key: str, decode_all: bool, found: list[tuple[str, str]]
) -> bytes | None:
    """Note what is wrong with a sample; returns the digest of its content, if it can be read."""
    try:
        sample = store.sample(key)
        messages = read_v2({"messages": sample.messages}).messages
    except Fault as fault:
        found.append((fault.reason.value, fault.detail))
        return None
    except Exception as error:  # whatever a broken row makes a reader do
        found.append((UNREADABLE_ROW, f"{type(error).__name__}: {error}"))
        return None
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            text = "".join(part["text"] for part in message["content"])
            if not split_trace(text)[1].strip():
                found.append((Reason.EMPTY.value, f"turn {number} has a trace and no answer"))
    digest = hashlib.blake2b(digest_size=16)
    shown: set[str] = set()
    parts = [part for message in sample.messages for part in _parts(message)]
    for part in parts:
        kind = part["type"]
        if kind == "text":
            digest.update(repr(part["text"]).encode(errors="surrogatepass"))
            continue
        shown.add(part[kind])
        data = _check_medium(sample, part, decode_all, found)
        digest.update(hashlib.blake2b(data or b"", digest_size=16).digest())
    for name in sorted(set(store.files_of(key)) - shown):
        found.append((UNSHOWN, name))
    return digest.digest()


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    role = {"type": "text", "text": message["role"]}
    return [role, {"type": "text", "text": content}] if isinstance(content, str) else [
        role, *content
    ]  # fmt: skip


def _check_medium(
    sample: Sample, part: Mapping[str, Any], decode_all: bool, found: list[tuple[str, str]]
) -> bytes | None:
    """Note what is wrong with a medium; returns its bytes."""
    kind, name = part["type"], part[part["type"]]
    try:
        data = sample.read_media(name)
    except Fault as fault:
        found.append((fault.reason.value, fault.detail))
        return None
    except (KeyError, ValueError):
        found.append((Reason.MISSING.value, name))
        return None
    try:
        header = probe(kind, data).metadata()
        if decode_all:
            _decode(kind, data, header)
    except ValueError as error:
        found.append((Reason.UNREADABLE.value, f"{name}: {error}"))
        return data
    stated = part.get("metadata") or {}
    differs = [
        f"{field} is {header[field]}, the row says {stated[field]}"
        for field in _SIZES
        if field in stated and field in header and stated[field] != header[field]
    ]
    if differs:
        found.append((WRONG_SIZE, f"{name}: {'; '.join(differs)}"))
    return data


def _decode(kind: str, data: bytes, header: Mapping[str, Any]) -> None:
    """Decode an image as the trainer does, or every frame of a video; raises ValueError."""
    if kind == "image":
        decode_image(data)
        return
    try:
        with open_video(io.BytesIO(data)) as container:
            frames = sum(1 for _ in container.decode(video=0))
    except Exception as error:  # FFmpeg's errors share no base
        raise ValueError(f"cannot decode the video: {error}") from error
    if frames < header["video_num_frames"]:
        raise ValueError(f"{frames} frames can be decoded, not {header['video_num_frames']}")

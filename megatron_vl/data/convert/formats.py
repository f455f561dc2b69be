"""The formats `mvl data convert --from` knows: which files hold their rows, and who reads a row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.convert.conversation import Draft
from megatron_vl.data.convert.parquet import read_parquet
from megatron_vl.data.convert.parts import read_openai, read_v2
from megatron_vl.data.convert.turns import read_llava, read_messages, read_sharegpt

_TEXT = (".jsonl", ".json")


@dataclass(frozen=True)
class Format:
    """One public format.

    read: one row to the internal form; raises Fault.
    suffixes: of the files its rows are in.
    one_file: a folder of several such files is several sources, not one.
    native: its rows and tars are indexed where they lie, not copied.
    """

    name: str
    read: Callable[[dict[str, Any]], Draft]
    suffixes: tuple[str, ...] = _TEXT
    one_file: bool = False
    native: bool = False


FORMATS = {
    found.name: found
    for found in (
        Format("nemotron-v2", read_v2, (".jsonl",), one_file=True, native=True),
        Format("nemotron-v1", read_llava, (".jsonl",), one_file=True),
        Format("llava", read_llava),
        Format("sharegpt", read_sharegpt),
        Format("messages", read_messages),
        Format("openai", read_openai),
        Format("hf-parquet", read_parquet, (".parquet",)),
    )
}


def source_files(kind: Format, source: Path) -> list[Path]:
    """The files that hold a source's rows, in a fixed order.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it holds no such files, or more than the format allows.
    """
    if not source.exists():
        raise FileNotFoundError(2, "no such file or folder", str(source))
    wanted = " or ".join(kind.suffixes)
    if source.is_file():
        if source.suffix not in kind.suffixes:
            raise ValueError(f"{source} is no {wanted} file, which {kind.name} rows are in")
        return [source]
    deep = ".parquet" in kind.suffixes
    files = sorted(
        file
        for file in (source.rglob("*") if deep else source.iterdir())
        if file.suffix in kind.suffixes and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{source} holds no {wanted} file, which {kind.name} rows are in")
    if kind.one_file and len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(
            f"{source} holds {len(files)} {wanted} files ({names}...); each is a source of its "
            "own with a weight of its own in a blend: convert one at a time"
        )
    return files


def media_roots(kind: Format, source: Path, media_root: Path | None) -> list[Path]:
    """Where a source's media are looked for, in order."""
    folder = source if source.is_dir() else source.parent
    roots = [] if media_root is None else [media_root]
    if kind.name == "nemotron-v1":
        roots += sorted(path for path in folder.glob("*_images") if path.is_dir())
    if kind.name == "nemotron-v2" and (folder / "media").is_dir():
        roots.append(folder / "media")
    if media_root is None:
        roots.append(folder)
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"the media root {root} is no folder")
    return roots

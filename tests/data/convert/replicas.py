"""Replicas of public sets, made up row by row, one row in a hundred broken on purpose.

A replica is written from `Spec`s (see `specs.py`). What a conversion must give back is read off the
specs, not off any reader's code. Rows are broken in as many ways as a format allows; which and how
is part of the replica.
"""

import base64
import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.data.convert.pictures import album, write_files
from tests.data.convert.specs import (
    MEDIA_BREAKS,
    NAME_BREAKS,
    TURN_BREAKS,
    Show,
    Spec,
    media_files,
    one_more_tag,
    says,
    showing,
    specs,
)

ROWS = 2000


@dataclass
class Replica:
    """A set on disk, and what is to come of it.

    kept: roles and parts of every good row, by number; media as bytes.
    faults: reason of every bad row. notes: reasons of rows that are kept all the same.
    """

    format: str
    source: Path
    media_root: Path | None
    kept: dict[int, list[tuple[str, list[tuple[str, str | bytes]]]]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    notes: set[tuple[int, str]] = field(default_factory=set)


def after(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A break of the written row."""

    def apply(row: dict[str, Any]) -> dict[str, Any]:
        change(row)
        return row

    return apply


@dataclass
class Recipe:
    """How a format is written: its kinds of rows, the row of a spec, and ways to break both."""

    kinds: list[str]
    write: Callable[[Spec], dict[str, Any]]
    spec_breaks: list[tuple[str, Callable[[Spec], None]]]
    row_breaks: list[tuple[str, Callable[[dict[str, Any]], Any]]]
    notes_literals: bool = True


def tagged(pieces: list[Any], bare: bool = False) -> Any:
    """Pieces as one text with placeholders; a lone piece that is no text stays what it is."""
    if len(pieces) == 1 and not isinstance(pieces[0], str | Show):
        return pieces[0]
    shown = [
        ("" if bare else f"<{piece.kind}>") if isinstance(piece, Show) else piece
        for piece in pieces
    ]
    return "".join(shown)


def write_llava(spec: Spec) -> dict[str, Any]:
    words = {"user": "human", "assistant": "gpt"}
    row: dict[str, Any] = {"id": spec.id}
    for kind in ("image", "video"):
        found = [show.name for show in spec.shown if show.kind == kind]
        if found:
            row[kind] = found[0] if len(found) == 1 else found
    row["conversations"] = [
        {"from": words.get(role, role), "value": tagged(pieces, spec.bare)}
        for role, pieces in spec.turns
    ]
    return row


def write_v1(spec: Spec) -> dict[str, Any]:
    return {**write_llava(spec), "metadata": {"pdf": "a.pdf", "page_number": 3, "url": None}}


def write_sharegpt(spec: Spec) -> dict[str, Any]:
    row = write_llava(spec)
    for kind in ("image", "video"):
        found = row.pop(kind, None)
        if found is not None:
            row[f"{kind}s"] = found if isinstance(found, list) else [found]
    if row["conversations"][0]["from"] == "system" and len(spec.turns) == 3:
        row["system"] = row["conversations"].pop(0)["value"]
    return row


def write_messages(spec: Spec) -> dict[str, Any]:
    row: dict[str, Any] = {"id": spec.id, "license": "cc-by-4.0"}
    for kind in ("image", "video"):
        found = [show.name for show in spec.shown if show.kind == kind]
        if found:
            row[f"{kind}s"] = found
    row["messages"] = [
        {"role": role, "content": tagged(pieces, spec.bare)} for role, pieces in spec.turns
    ]
    return row


def write_openai(spec: Spec) -> dict[str, Any]:
    """Parts in four ways, by the row's number: URL objects, file URLs, Qwen's names, data URLs."""
    way = int(spec.id.split("-")[1]) % 4

    def part(piece: Any) -> dict[str, Any]:
        if not isinstance(piece, Show):
            return {"type": "text", "text": piece}
        if way == 3 and piece.name in album():
            body = base64.b64encode(album()[piece.name]).decode()
            url = f"data:image/{piece.name.rsplit('.')[-1]};base64,{body}"
            return {"type": "image_url", "image_url": {"url": url}}
        if way == 1:
            return {"type": f"{piece.kind}_url", f"{piece.kind}_url": {"url": piece.name}}
        return {"type": piece.kind, piece.kind: piece.name}

    return {
        "messages": [
            {
                "role": role,
                "content": pieces[0]
                if len(pieces) == 1 and isinstance(pieces[0], str)
                else [part(piece) for piece in pieces],
            }
            for role, pieces in spec.turns
        ]
    }


def write_v2(spec: Spec) -> dict[str, Any]:
    parts = [
        {
            "role": role,
            "content": [
                {"type": piece.kind, piece.kind: piece.name, "metadata": {"width": 7, "height": 7}}
                if isinstance(piece, Show)
                else {"type": "text", "text": piece}
                for piece in pieces
            ],
        }
        for role, pieces in spec.turns
    ]
    return {"id": spec.id, "messages": parts}


def write_cauldron(spec: Spec) -> dict[str, Any]:
    turns = [pieces for _, pieces in spec.turns]
    files = media_files()
    images = [{"bytes": files[show.name], "path": None} for show in spec.shown]
    texts = [
        {"user": tagged([p for p in ask if not isinstance(p, Show)]), "assistant": answer[0]}
        for ask, answer in zip(turns[::2], turns[1::2], strict=True)
    ]
    return {"images": images, "texts": texts, "source": "a_set"}


CONVERSATION_BREAKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("wrong type", after(lambda row: row.update(conversations="a text"))),
    ("wrong type", after(lambda row: row["conversations"][0].update(value=17))),
    ("wrong type", after(lambda row: row.pop("conversations"))),
    ("bad json", lambda row: json.dumps(row).replace('"id":', '"id"', 1)),
    ("wrong type", lambda row: json.dumps([1, 2])),
]
MESSAGE_BREAKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("wrong type", after(lambda row: row.update(messages={"role": "user"}))),
    ("wrong type", after(lambda row: row["messages"][0].update(content=17))),
    ("bad json", lambda row: json.dumps(row)[:-9]),
    ("wrong type", lambda row: json.dumps("a row")),
]
TAG_BREAKS = [("placeholder count", one_more_tag)]
VIDEO_BREAK = ("unreadable medium", showing("bad/cut.mp4"))

RECIPES = {
    "llava": Recipe(
        ["front", "text", "middle", "bare", "two", "many turns", "video"],
        write_llava,
        [*MEDIA_BREAKS, *NAME_BREAKS, *TURN_BREAKS, *TAG_BREAKS, VIDEO_BREAK],
        [
            *CONVERSATION_BREAKS,
            ("placeholder count", after(lambda row: row.update(image=[]))),
            ("wrong type", after(lambda row: row.update(image=3))),
        ],
    ),
    "nemotron-v1": Recipe(
        ["front", "middle", "bare", "many turns"],
        write_v1,
        [*MEDIA_BREAKS, *TURN_BREAKS, *TAG_BREAKS],
        CONVERSATION_BREAKS,
    ),
    "sharegpt": Recipe(
        ["front", "system", "middle", "two", "text", "video"],
        write_sharegpt,
        [*MEDIA_BREAKS, *NAME_BREAKS, *TURN_BREAKS, *TAG_BREAKS],
        [
            *CONVERSATION_BREAKS,
            ("placeholder count", after(lambda row: row.update(images=[]))),
        ],
    ),
    "messages": Recipe(
        ["front", "system", "middle", "two", "text", "many turns"],
        write_messages,
        [*MEDIA_BREAKS, *NAME_BREAKS, *TURN_BREAKS, *TAG_BREAKS],
        MESSAGE_BREAKS,
    ),
    "openai": Recipe(
        ["front", "system", "middle", "two", "text", "many turns", "video"],
        write_openai,
        [*MEDIA_BREAKS, *NAME_BREAKS, *TURN_BREAKS, VIDEO_BREAK],
        [
            *MESSAGE_BREAKS,
            (
                "unreadable medium",
                after(
                    lambda row: row["messages"][0].update(
                        content=[{"type": "image_url", "image_url": "data:image/png;base64,@@@"}]
                    )
                ),
            ),
        ],
        notes_literals=False,
    ),
    "nemotron-v2": Recipe(
        ["front", "system", "middle", "two", "text", "many turns", "video"],
        write_v2,
        [*MEDIA_BREAKS, *TURN_BREAKS, VIDEO_BREAK],
        [
            *MESSAGE_BREAKS,
            (
                "wrong type",
                after(
                    lambda row: row["messages"][0]["content"].append(
                        {"type": "audio", "audio": "a.wav"}
                    )
                ),
            ),
        ],
        notes_literals=False,
    ),
    "hf-parquet": Recipe(
        ["front", "two", "text", "many turns"],
        write_cauldron,
        [
            *[broken for broken in MEDIA_BREAKS if broken[0] != "missing medium"],
            ("empty content", says("assistant", [" "])),
        ],
        [
            ("wrong type", after(lambda row: row["texts"][0].update(assistant=None))),
            ("wrong type", after(lambda row: row.update(texts=None))),
            ("missing medium", after(lambda row: row.update(images=[{"bytes": None}]))),
            ("no assistant turn", after(lambda row: row.update(texts=[]))),
        ],
        notes_literals=False,
    ),
}


def build(format_name: str, folder: Path, rows: int = ROWS) -> Replica:
    """Write a replica under a folder."""
    recipe = RECIPES[format_name]
    dice = random.Random(f"{format_name} {rows}")
    made = specs(dice, recipe.kinds, rows, sorted(album()))
    replica = Replica(format_name, folder / "set", folder / "media")
    lines: list[Any] = []
    breaks = _breaks(recipe, made, dice)
    for index, spec in enumerate(made):
        if index == 700 and format_name not in ("llava", "hf-parquet"):
            lines.append("   ")  # a blank line is no row, and counts as a line
        number = len(lines) + 1
        if index in breaks:
            reason, of_spec, change = breaks[index]
            if of_spec:
                change(spec)
            row = recipe.write(spec)
            lines.append(row if of_spec else change(row))
            replica.faults[number] = reason
            continue
        if index == rows - 5 and format_name not in ("openai", "hf-parquet"):
            spec.id = "row-3"  # an id that an earlier row has
            replica.notes.add((number, "duplicate id"))
        if recipe.notes_literals and _says_tags(spec):
            replica.notes.add((number, "placeholder as text"))
        lines.append(recipe.write(spec))
        replica.kept[number] = expected(spec, format_name)
    _write(replica, lines)
    return replica


def _breaks(
    recipe: Recipe, made: list[Spec], dice: random.Random
) -> dict[int, tuple[str, bool, Callable[[Any], Any]]]:
    """Which rows are broken and how: every way at least once, one row in a hundred in all."""
    ways = [(reason, True, change) for reason, change in recipe.spec_breaks]
    ways += [(reason, False, change) for reason, change in recipe.row_breaks]
    count = max(len(ways), len(made) // 100)
    whole = [
        index
        for index, spec in enumerate(made)
        if recipe.kinds[index % len(recipe.kinds)] == "front" and 10 < index < len(made) - 10
    ]
    chosen = sorted(dice.sample(whole, count))
    dice.shuffle(ways)
    return {index: ways[at % len(ways)] for at, index in enumerate(chosen)}


def _says_tags(spec: Spec) -> bool:
    return any(
        "<image>" in piece or "<video>" in piece
        for _, pieces in spec.turns
        for piece in pieces
        if isinstance(piece, str)
    )


def expected(spec: Spec, format_name: str) -> list[tuple[str, list[tuple[str, str | bytes]]]]:
    """Roles and parts that must come back."""
    files = media_files()
    turns = []
    for role, pieces in spec.turns:
        if format_name == "hf-parquet" and any(isinstance(piece, Show) for piece in pieces):
            shown = [piece for piece in pieces if isinstance(piece, Show)]
            said = "".join(piece for piece in pieces if not isinstance(piece, Show))
            pieces = [*shown, said]
        turns.append(
            (
                role,
                [
                    (piece.kind, files[piece.name]) if isinstance(piece, Show) else ("text", piece)
                    for piece in pieces
                ],
            )
        )
    return turns


def _write(replica: Replica, lines: list[Any]) -> None:
    """Put rows and media where the format has them."""
    files = media_files()
    source = replica.source
    source.mkdir(parents=True)
    if replica.format == "hf-parquet":
        _write_parquet(source / "data", lines)
        replica.media_root = None
        return
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    match replica.format:
        case "llava":
            (source / "train.json").write_text("[\n" + ",\n".join(texts) + "\n]\n")
            write_files(replica.media_root or source, files)
        case "nemotron-v1" | "nemotron-v2":
            (source / "rows.jsonl").write_text("\n".join(texts) + "\n")
            inside = "rows_images" if replica.format == "nemotron-v1" else "media"
            write_tars(source / inside, files, 3)
            replica.media_root = None
        case _:
            (source / "rows.jsonl").write_text("\n".join(texts) + "\n")
            assert replica.media_root is not None
            write_files(replica.media_root, files)


def write_tars(folder: Path, files: dict[str, bytes], count: int) -> None:
    """Files dealt out to tars."""
    folder.mkdir(parents=True)
    for index in range(count):
        with tarfile.open(folder / f"shard_{index:06d}.tar", "w") as tar:
            for name in sorted(files)[index::count]:
                info = tarfile.TarInfo(name)
                info.size = len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))


def _write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Two files of several row groups."""
    folder.mkdir(parents=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pair = pyarrow.struct([("user", pyarrow.string()), ("assistant", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("images", pyarrow.list_(image)),
            ("texts", pyarrow.list_(pair)),
            ("source", pyarrow.string()),
        ]
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema), folder / "train-00000.parquet", row_group_size=30
    )

"""Every format: what was broken is reported by its row, what was whole comes back as it went in."""

import json
from pathlib import Path

import pytest

from megatron_vl.data import chat
from megatron_vl.data.convert.formats import FORMATS
from megatron_vl.data.convert.run import Request, convert
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, Tokenizer
from megatron_vl.sequence.visual import PatchGrid
from tests.data.convert.replicas import RECIPES, Replica, build


@pytest.fixture(scope="module", params=sorted(RECIPES))
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def converted(replica: Replica) -> Path:
    out = replica.source.parent / "data" / "a_set"
    request = Request(
        replica.format, replica.source, out, replica.media_root,
        shard_size=500_000, held_out=0.1, strict=False,
    )  # fmt: skip
    convert(request)
    return out


def read_back(folder: Path) -> dict[int, list[tuple[str, list[tuple[str, str | bytes]]]]]:
    """Rows as the loader's store reads them, by row number, in its order."""
    found = {}
    for split in ("train", "val"):
        store = SourceStore(folder.parent, folder.name, split)
        for key in store.keys:
            sample = store.sample(key)
            turns = []
            for message in sample.messages:
                parts = []
                for part in message["content"]:
                    kind = part["type"]
                    value = part["text"] if kind == "text" else sample.read_media(part[kind])
                    parts.append((kind, value))
                turns.append((message["role"], parts))
            found[int(key.rsplit("-", 1)[1])] = turns
        numbers = [int(key.rsplit("-", 1)[1]) for key in store.keys]
        assert numbers == sorted(numbers), "the rows' order is kept"
        store.close()
    return found


def test_every_fault_is_reported_by_its_row(replica: Replica, converted: Path) -> None:
    findings = [
        json.loads(line) for line in (converted / "findings.jsonl").read_text().splitlines()
    ]
    noted = ("duplicate id", "placeholder as text")
    faults = {row["row"]: row["reason"] for row in findings if row["reason"] not in noted}
    notes = {(row["row"], row["reason"]) for row in findings if row["reason"] in noted}
    assert faults == replica.faults
    assert notes == replica.notes
    report = json.loads((converted / "conversion.json").read_text())
    listed = {row: entry["reason"] for entry in report["by_reason"] for _, row in entry["rows"]}
    assert listed == replica.faults
    assert report["dropped"] == len(replica.faults)
    assert sum(report["kept"].values()) == len(replica.kept)
    assert report["rows"] == len(replica.faults) + len(replica.kept)


def test_every_good_row_comes_back_as_it_went_in(replica: Replica, converted: Path) -> None:
    found = read_back(converted)
    assert found.keys() == replica.kept.keys()
    for row, turns in replica.kept.items():
        assert found[row] == turns, f"row {row}"


def test_no_text_becomes_a_special_token(
    replica: Replica, converted: Path, tokenizer: Tokenizer
) -> None:
    """The rows hold the names of special tokens; those in the tokens are the template's alone."""
    store = SourceStore(converted.parent, converted.name, "train")
    for key in store.keys[:60]:
        messages = store.sample(key).messages
        if any(part["type"] == "video" for part in chat.visual_parts(messages)):
            continue
        shown = [(PatchGrid(2, 2),) for _ in chat.visual_parts(messages)]
        document = chat.encode_conversation(messages, tokenizer, shown)
        special = [int(t) for t in document.tokens_N if int(t) in tokenizer.special_ids]
        pieces = chat.conversation_pieces(messages)
        template = []
        for piece in pieces:
            if piece.kind == "special":
                template.append(tokenizer.id_of(piece.text))
            elif piece.kind == "image":
                template += map(tokenizer.id_of, (IMAGE_START, IMAGE, IMAGE_END))
        assert special == template
    store.close()


def test_native_rows_are_not_copied(converted: Path, replica: Replica) -> None:
    links = [path for path in converted.rglob("*.tar") if path.is_symlink()]
    whole = [path for path in converted.rglob("*.tar") if not path.is_symlink()]
    if replica.format == "nemotron-v2":
        assert len(links) == 3
        assert not whole
    else:
        assert whole
        assert not links
    assert not (converted / ".convert").exists()


def test_there_is_a_replica_of_every_format() -> None:
    assert set(RECIPES) == set(FORMATS)

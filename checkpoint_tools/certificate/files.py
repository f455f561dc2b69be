"""Checks of a release's files that need no model: what is there, and whether it is what was made.

Everything that is not a tensor is made again from the checkpoint and compared with the file, byte
by byte or, in config.json, field by field; the shipped code is compared before any of it runs.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools import release_files
from checkpoint_tools.certificate.check import CERTIFICATE_FILE, PAGE_FILE, Findings
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.explain import PROVENANCE_FILE, provenance
from checkpoint_tools.export_hf import config_files
from checkpoint_tools.name_rules import ENCODER_PREFIX
from checkpoint_tools.published_config import prefix_tokens
from checkpoint_tools.published_folder import CHECKSUMS_FILE, CONFIG_FILE, read_json

CARD_FILE = "README.md"
_PICKLED = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""How archives of torch.save and pickles begin."""
_CLASS_TOKEN = ENCODER_PREFIX + "radio_model.model.patch_generator.cls_token.token"
_WRITTEN_ELSEWHERE = {CHECKSUMS_FILE, CERTIFICATE_FILE, PAGE_FILE}


def check_no_pickles(folder: Path, findings: Findings) -> bool:
    """No file begins as a pickle does; none is opened any further here."""
    wrong, looked = [], 0
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        looked += 1
        with path.open("rb") as file:
            start = file.read(4)
        if any(start.startswith(sign) for sign in _PICKLED):
            wrong.append(f"{path.relative_to(folder)} is a pickle or a torch.save archive")
    return findings.none_of("no_pickle", wrong, looked, "files")


def check_file_hashes(folder: Path, findings: Findings) -> bool:
    """Every file that is no shard is recorded with its hash, and has it."""
    recorded = read_json(folder / CHECKSUMS_FILE)
    files = dict(recorded["files"])
    shards = {entry["file"] for entry in recorded["tensors"].values()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wrong = [f"{name} is missing" for name in sorted((files.keys() | shards) - there)]
    over = there - files.keys() - shards - _WRITTEN_ELSEWHERE
    wrong += [f"{name} is recorded nowhere" for name in sorted(over)]
    for name, digest in sorted(files.items()):
        path = folder / name
        if name in there and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(f"{name} is not what its recorded SHA-256 says")
    return findings.none_of("file_hashes", wrong, len(files), "files")


def check_code(folder: Path, findings: Findings) -> bool:
    """The code is the code this program ships, so running it is safe."""
    shipped = release_files.code_files()
    wrong = [
        f"{name} is not the shipped code"
        for name, path in shipped.items()
        if not _same(folder / name, path.read_bytes())
    ]
    wrong += [
        f"{path.name} is no code of this release"
        for path in sorted(folder.rglob("*.py"))
        if path.name not in shipped
    ]
    return findings.none_of("code", wrong, len(shipped), "code files")


def check_config(subject: Subject, files: release_files.ReleaseFiles, findings: Findings) -> bool:
    """Every field of config.json (and hf_quant_config.json) is what the checkpoint gives."""
    made = config_files(
        subject.source, subject.table, subject.rows, subject.format, subject.chosen, files
    )
    fields = []
    for name, expected in made.items():
        fields += _differing(name, expected, read_json(subject.folder / name))
    return findings.none_of("config", fields, len(made), "files")


def check_auto_map(subject: Subject, files: release_files.ReleaseFiles, findings: Findings) -> bool:
    """No settings file names other code than the release's: what it names would be run."""
    made = config_files(
        subject.source, subject.table, subject.rows, subject.format, subject.chosen, files
    )
    with tempfile.TemporaryDirectory(prefix="mvl-") as base:
        files.write(Path(base), subject.source, made[CONFIG_FILE], 0)
        made |= {path.name: read_json(path) for path in sorted(Path(base).glob("*.json"))}
    wrong, looked = [], 0
    for path in sorted(subject.folder.glob("*.json")):
        if path.name in _WRITTEN_ELSEWHERE:
            continue
        looked += 1
        found, expected = (d.get("auto_map") for d in (read_json(path), made.get(path.name, {})))
        if found != expected:
            wrong.append(f"{path.name} says auto_map {found}, its code wants {expected}")
    return findings.none_of("auto_map", wrong, looked, "files")


def check_prefix_tokens(subject: Subject, findings: Findings) -> bool:
    """Config, tensor and model agree on the encoder's prefix tokens, by either reader's formula."""
    vision = read_json(subject.folder / CONFIG_FILE)["vision_config"]
    own = subject.source.config.model.encoder.num_prefix_tokens
    by_args = prefix_tokens({"args": vision["args"]})
    counts = {
        "num_cls_tokens + num_registers": prefix_tokens(vision),
        "args": by_args,
        "rows of the tensor": subject.published.tensors[_CLASS_TOKEN].shape[0],
    }
    wrong = [f"{what} gives {count}" for what, count in counts.items() if count != own]
    says = f"{'; '.join(wrong)}; the model has {own} prefix tokens" if wrong else ""
    return findings.add("prefix_tokens", not wrong, sorted(set(counts.values())), [own], says)


def check_processor_files(
    subject: Subject, files: release_files.ReleaseFiles, findings: Findings
) -> bool:
    """Tokenizer, template, image processor and generation settings, byte by byte."""
    config = read_json(subject.folder / CONFIG_FILE)
    with tempfile.TemporaryDirectory(prefix="mvl-") as base:
        made = Path(base)
        files.write(made, subject.source, config, 0)
        code = release_files.code_files()
        names = sorted(p.name for p in made.iterdir() if p.name not in {CARD_FILE, *code})
        wrong = [
            f"{name} is not what the checkpoint was trained with{_where(made / name, own)}"
            for name in names
            if not _same(own := subject.folder / name, (made / name).read_bytes())
        ]
    return findings.none_of("processor_files", wrong, len(names), "files")


def check_provenance(subject: Subject, findings: Findings) -> bool:
    """What the release says of its origin is what the checkpoint's receipts say."""
    found = read_json(subject.folder / PROVENANCE_FILE)
    expected = json.loads(json.dumps(provenance(subject.source)))
    del expected["config_hash"]  # another version of this program may hash the same config anew
    wrong = _differing(PROVENANCE_FILE, expected, {key: found.get(key) for key in expected})
    return findings.none_of("provenance", wrong, len(expected), "entries")


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _where(made: Path, found: Path) -> str:
    """The first key that differs between two JSON files, for the message."""
    if not found.is_file():
        return " (it is missing)"
    try:
        differing = _differing("", json.loads(made.read_text()), json.loads(found.read_text()))
    except ValueError:
        return ""
    return f" ({differing[0].strip()})" if differing else ""


def _differing(where: str, expected: Any, found: Any) -> list[str]:
    """Where two JSON values differ, a sentence each."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return [
            line
            for key in sorted({*expected, *found})
            for line in _differing(f"{where} {key}", expected.get(key), found.get(key))
        ]
    if expected == found:
        return []
    return [f"{where} is {_short(found)}, expected {_short(expected)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

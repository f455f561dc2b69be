"""Damaged releases, each caught and named by the certificate, though their hashes were renewed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.calibrate import calibrate
from checkpoint_tools.certificate import parity, prompts
from checkpoint_tools.certificate.check import Bounds, Findings, StoppedError
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.certificate.worker import Request, check_files
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.published_folder import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE
from checkpoint_tools.stage_source import StageSource, open_stage
from tests.checkpoint_tools.conftest import SHARD_BYTES, quiet
from tests.checkpoint_tools.test_corruption import Explodes

MIXER = "language_model.backbone.layers.{}.mixer."
Releases = dict[str, Path]


@pytest.fixture(scope="module")
def releases(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Releases:
    base = tmp_path_factory.mktemp("releases")
    amax = base / "amax.safetensors"
    calibrate(served, amax, quiet, 2)
    made = {}
    for kind in ("bf16", "fp8", "nvfp4"):
        made[kind] = base / kind
        export(served, made[kind], ExportOptions(kind, SHARD_BYTES, amax=amax), quiet)
    return made


@pytest.fixture(scope="module")
def source(served: Path) -> StageSource:
    return open_stage(served)


@pytest.fixture
def copies(releases: Releases, tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        return shutil.copytree(releases[kind], tmp_path / kind)

    return copy


def look(folder: Path, source: StageSource) -> tuple[Findings, Subject | None]:
    """The checks of the files; a check that stops them is among the failed ones."""
    findings = Findings(quiet)
    request = Request(str(folder), "", "", Bounds())
    try:
        return findings, check_files(request, source, findings)
    except StoppedError:
        return findings, None


def failed(findings: Findings) -> dict[str, str]:
    return {check.name: check.says for check in findings.checks if not check.passed}


def renew(folder: Path) -> None:
    """Record every tensor and file with the hash it has now, as a careless tool would."""
    recorded = json.loads((folder / CHECKSUMS_FILE).read_text())
    recorded["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != CHECKSUMS_FILE and path.suffix != ".safetensors"
    }
    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
            tensors[name] = {"file": path.name, "sha256": digest}
    recorded["tensors"] = tensors
    (folder / CHECKSUMS_FILE).write_text(json.dumps(recorded))


def rewrite(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace one tensor, or leave it out of shard and index; hashes are renewed."""
    index = json.loads((folder / INDEX_FILE).read_text())
    path = folder / index["weight_map"][name]
    held = load_file(path)
    changed = change(held.pop(name))
    if changed is None:
        del index["weight_map"][name]
        (folder / INDEX_FILE).write_text(json.dumps(index))
    else:
        held[name] = changed.contiguous()
    save_file(held, path, metadata={"format": "pt"})
    renew(folder)


def edit_json(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))
    renew(folder)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4"])
def test_a_whole_release_passes(releases: Releases, source: StageSource, kind: str) -> None:
    findings, _ = look(releases[kind], source)
    assert not failed(findings)
    names = {check.name for check in findings.checks}
    assert names >= {"no_pickle", "index", "names", "tensor_hashes", "tensors_of_checkpoint"}
    assert names >= {"code", "auto_map", "config", "prefix_tokens", "processor_files"}
    assert ("scales" in names) == (kind != "bf16")
    bits = next(check for check in findings.checks if check.name == "bits_per_parameter")
    assert bits.measured == {"bf16": pytest.approx(16, abs=0.02), "fp8": 8, "nvfp4": 4.5}[kind]


def _flip(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    return "tensor_hashes"


def _drop(folder: Path) -> str:
    rewrite(folder, MIXER.format(2) + "D", lambda tensor: None)
    return "names"


def _swap(folder: Path) -> str:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    return "index"


def _lose_scale(folder: Path) -> str:
    rewrite(folder, MIXER.format(3) + "k_proj.input_scale", lambda tensor: None)
    return "names"


def _change_scale(folder: Path) -> str:
    rewrite(folder, MIXER.format(1) + "up_proj.weight_scale", lambda tensor: tensor * 1.01)
    return "scales"


def _change_block_scale(folder: Path) -> str:
    def halve(scales: Tensor) -> Tensor:
        changed = scales.float()
        changed[3, 1] /= 4
        return changed.to(scales.dtype)

    rewrite(folder, MIXER.format(1) + "up_proj.weight_scale", halve)
    return "scales"


def _change_input_scale(folder: Path) -> str:
    rewrite(folder, MIXER.format(0) + "out_proj.input_scale", lambda tensor: tensor * 0.5)
    return "scales"


def _zero(folder: Path) -> str:
    rewrite(folder, MIXER.format(4) + "down_proj.weight", torch.zeros_like)
    return "tensors_of_checkpoint"


def _stale_auto_map(folder: Path) -> str:
    edit_json(folder, CONFIG_FILE, lambda c: c["auto_map"].update(AutoModel="modeling.Older"))
    return "auto_map"


def _processor_of_others(folder: Path) -> str:
    other = "/elsewhere--processing.Processor"
    edit_json(folder, "processor_config.json", lambda c: c["auto_map"].update(AutoProcessor=other))
    return "auto_map"


def _other_code(folder: Path) -> str:
    path = folder / "modeling.py"
    path.write_text(path.read_text().replace("relu(hidden).square()", "relu(hidden)"))
    renew(folder)
    return "code"


def _added_code(folder: Path) -> str:
    (folder / "helper.py").write_text("import os\n")
    renew(folder)
    return "code"


def _prefix_tokens(folder: Path) -> str:
    def fewer(config: dict[str, Any]) -> None:
        config["vision_config"]["args"]["register_multiple"] = 8

    edit_json(folder, CONFIG_FILE, fewer)
    return "prefix_tokens"


def _other_tokenizer(folder: Path) -> str:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["H"], vocabulary["W"] = vocabulary["W"], vocabulary["H"]

    edit_json(folder, "tokenizer.json", swap)
    return "processor_files"


def _cut_index(folder: Path) -> str:
    text = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(text[: len(text) // 2])
    return "index"


def _changed_template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("User\\n", "Human\\n").replace("User", "Human"))
    renew(folder)
    return "processor_files"


def _changed_mean(folder: Path) -> str:
    edit_json(folder, "preprocessor_config.json", lambda c: c.update(norm_mean=[0.5, 0.5, 0.5]))
    return "processor_files"


def _duplicate_key(folder: Path) -> str:
    """A header that names one tensor twice: readers take the first or the last."""
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    name, entry = next((n, e) for n, e in json.loads(text).items() if n != "__metadata__")
    text = text[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}"
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])
    return "index"


def _extra_shard(folder: Path) -> str:
    save_file({"language_model.extra": torch.ones(2)}, folder / "model-extra.safetensors")
    return "file_hashes"


def _other_field(folder: Path) -> str:
    edit_json(folder, CONFIG_FILE, lambda c: c["llm_config"].update(layer_norm_epsilon=1e-6))
    return "config"


def _other_checkpoint(folder: Path) -> str:
    edit_json(folder, "provenance.json", lambda p: p.update(digest="0" * 64))
    return "provenance"


DAMAGES: list[tuple[str, Callable[[Path], str], tuple[str, ...]]] = [
    ("bf16", _flip, ("model-00002-of",)),
    ("bf16", _drop, ("layers.2.mixer.D",)),
    ("bf16", _swap, ("swapped",)),
    ("fp8", _lose_scale, ("k_proj.input_scale",)),
    ("fp8", _change_scale, ("up_proj", "is not the amax")),
    ("nvfp4", _change_block_scale, ("up_proj", "is off by")),
    ("nvfp4", _change_input_scale, ("out_proj", "the input scale")),
    ("bf16", _zero, ("layers.4.mixer.down_proj",)),
    ("bf16", _stale_auto_map, ("config.json", "modeling.Older")),
    ("bf16", _processor_of_others, ("processor_config.json", "/elsewhere")),
    ("bf16", _other_code, ("modeling.py",)),
    ("bf16", _added_code, ("helper.py",)),
    ("bf16", _prefix_tokens, ("args gives", "the model has 16 prefix tokens")),
    ("bf16", _other_tokenizer, ("tokenizer.json",)),
    ("bf16", _cut_index, (INDEX_FILE,)),
    ("bf16", _changed_template, ("chat_template.jinja",)),
    ("bf16", _changed_mean, ("preprocessor_config.json", "norm_mean")),
    ("bf16", _duplicate_key, ("twice",)),
    ("bf16", _extra_shard, ("model-extra.safetensors is recorded nowhere",)),
    ("bf16", _other_field, ("layer_norm_epsilon is 1e-06, expected 1e-05",)),
    ("bf16", _other_checkpoint, ("digest",)),
]


@pytest.mark.parametrize(
    ("kind", "damage", "words"), DAMAGES, ids=[d[1].__name__.strip("_") for d in DAMAGES]
)
def test_damage_is_caught_and_named(
    copies: Callable[[str], Path],
    source: StageSource,
    kind: str,
    damage: Callable[[Path], str],
    words: tuple[str, ...],
) -> None:
    folder = copies(kind)
    check = damage(folder)
    found = failed(look(folder, source)[0])
    assert check in found, found
    for word in words:
        assert word in found[check], found[check]


def test_a_pickle_is_named_and_never_unpickled(
    copies: Callable[[str], Path], source: StageSource, tmp_path: Path
) -> None:
    folder, mark = copies("bf16"), tmp_path / "unpickled"
    shard = sorted(folder.glob("*.safetensors"))[0]
    torch.save(Explodes(mark), shard)
    findings, subject = look(folder, source)
    assert shard.name in failed(findings)["no_pickle"]
    assert subject is None
    assert not mark.exists()
    shutil.rmtree(folder)
    folder = copies("bf16")
    torch.save(Explodes(mark), folder / "scaler.dat")
    assert "scaler.dat" in failed(look(folder, source)[0])["no_pickle"]
    assert not mark.exists()


def processed(folder: Path, source: StageSource) -> dict[str, str]:
    """The checks of prompts through the processor of a folder."""
    import transformers

    findings = Findings(quiet)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    asked = prompts.make_prompts(prompts.without_pruning(source.config), 20)
    assert {prompt.kind for prompt in asked} == set(prompts.KINDS)
    assert {prompt.reasoning for prompt in asked} == {False, True}
    assert sum(prompt.origin != "made" for prompt in asked) == 10
    prompts.check_prompts(processor, source.config, asked, Bounds().pixels, findings)
    return failed(findings)


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (None, None),
        (_other_tokenizer, "prompt_ids"),
        (_changed_template, "prompt_ids"),
        (_changed_mean, "prompt_pixels"),
    ],
)
def test_prompts_find_what_a_comparison_of_files_would_not(
    copies: Callable[[str], Path],
    source: StageSource,
    offline: None,
    damage: Callable[[Path], str] | None,
    check: str | None,
) -> None:
    folder = copies("bf16")
    if damage is not None:
        damage(folder)
    found = processed(folder, source)
    assert set(found) == ({check} if check else set())
    assert not check or "prompt " in found[check]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (MIXER.format(3) + "k_proj.weight", "decoder layer 3"),
        ("vision_model.radio_model.model.blocks.1.mlp.fc1.weight", "encoder layer 1"),
    ],
)
def test_the_first_diverging_layer_is_named(
    copies: Callable[[str], Path], source: StageSource, offline: None, name: str, first: str
) -> None:
    import transformers

    folder = copies("bf16")
    rewrite(folder, name, lambda tensor: tensor * 1.02)
    subject = look(folder, source)[1]
    assert subject is not None
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    findings = Findings(quiet)
    asked = prompts.make_prompts(prompts.without_pruning(source.config), 8)
    parity.check_parity(subject, asked, processor, Bounds(new_tokens=2), findings, quiet)
    assert f"the first diverging layer is {first}, by" in failed(findings)["layers"]

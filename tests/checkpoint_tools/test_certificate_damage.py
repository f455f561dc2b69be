"""More damaged releases: what serving programs load without a word, the certificate names.

Hashes are renewed after each, so that none is found by those alone (`test_certificate.py`).
"""

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
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.published_folder import CONFIG_FILE, INDEX_FILE
from checkpoint_tools.stage_source import StageSource, open_stage
from tests.checkpoint_tools.conftest import SHARD_BYTES, quiet
from tests.checkpoint_tools.test_certificate import MIXER, edit_json, failed, look, renew, rewrite

BLOCK = "vision_model.radio_model.model.blocks.0."


@pytest.fixture(scope="module")
def releases(served: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("releases")
    amax = base / "amax.safetensors"
    calibrate(served, amax, quiet, 2)
    made = {kind: base / kind for kind in ("bf16", "nvfp4")}
    for kind, folder in made.items():
        export(served, folder, ExportOptions(kind, SHARD_BYTES, amax=amax), quiet)
    return made


@pytest.fixture(scope="module")
def source(served: Path) -> StageSource:
    return open_stage(served)


def _nan(folder: Path) -> str:
    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = torch.nan
        return tensor

    rewrite(folder, MIXER.format(0) + "out_proj.weight", spoil)
    return "tensors_of_checkpoint"


def _exchange(folder: Path) -> str:
    """Two tensors of one shape under each other's names."""
    names = [BLOCK + "norm1.weight", BLOCK + "norm2.weight"]
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    first, second = (load_file(folder / weight_map[name])[name] for name in names)
    rewrite(folder, names[0], lambda tensor: second)
    rewrite(folder, names[1], lambda tensor: first)
    return "tensors_of_checkpoint"


def _sign(folder: Path) -> str:
    """The sign of one NVFP4 code."""

    def flip(codes: Tensor) -> Tensor:
        place = int((codes.view(-1) & 7).argmax())
        codes.view(-1)[place] ^= 8
        return codes

    rewrite(folder, MIXER.format(1) + "up_proj.weight", flip)
    return "scales"


def _other_type(folder: Path) -> str:
    rewrite(folder, MIXER.format(0) + "in_proj.weight", lambda tensor: tensor.float())
    return "dtypes_and_shapes"


def _turned(folder: Path) -> str:
    rewrite(folder, MIXER.format(1) + "up_proj.weight", lambda tensor: tensor.T)
    return "names"


def _added(folder: Path) -> str:
    """A tensor more, in shard and index."""
    index = json.loads((folder / INDEX_FILE).read_text())
    path = folder / sorted(set(index["weight_map"].values()))[0]
    name = MIXER.format(9) + "D"
    save_file({**load_file(path), name: torch.ones(4)}, path, metadata={"format": "pt"})
    index["weight_map"][name] = path.name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    renew(folder)
    return "names"


def _cut_shard(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-64])
    return "index"


def _lost_shard(folder: Path) -> str:
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    return "index"


def _index_leads_out(folder: Path) -> str:
    """An index whose shard lies beside the folder."""
    index = json.loads((folder / INDEX_FILE).read_text())
    name, file = next(iter(index["weight_map"].items()))
    shutil.copy(folder / file, folder.parent / file)
    index["weight_map"][name] = f"../{file}"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return "index"


def _lost_code(folder: Path) -> str:
    (folder / "configuration.py").unlink()
    renew(folder)
    return "code"


def _other_patterns(folder: Path) -> str:
    """A list of unquantized modules without the output layer."""

    def fewer(config: dict[str, Any]) -> None:
        names = config["quantization"]["exclude_modules"]
        names.remove(next(name for name in names if "lm_head" in name))

    edit_json(folder, "hf_quant_config.json", fewer)
    return "config"


def _other_algorithm(folder: Path) -> str:
    edit_json(
        folder, CONFIG_FILE, lambda c: c["quantization_config"].update(quant_algo="NVFP4_AWQ")
    )
    return "kind"


def _other_end(folder: Path) -> str:
    edit_json(folder, "generation_config.json", lambda c: c.update(eos_token_id=5))
    return "processor_files"


def _adds_start(folder: Path) -> str:
    edit_json(folder, "tokenizer_config.json", lambda c: c.update(add_bos_token=True))
    return "processor_files"


def _other_tile(folder: Path) -> str:
    edit_json(folder, CONFIG_FILE, lambda c: c.update(force_image_size=c["force_image_size"] * 2))
    return "config"


DAMAGES: list[tuple[str, Callable[[Path], str], str]] = [
    ("bf16", _nan, "layers.0.mixer.out_proj"),
    ("bf16", _exchange, BLOCK + "norm1.weight"),
    ("nvfp4", _sign, "up_proj: a decoded weight is off"),
    ("bf16", _other_type, "in_proj.weight is F32, expected BF16"),
    ("bf16", _turned, "layers.1.mixer.up_proj.weight"),
    ("bf16", _added, "layers.9.mixer.D"),
    ("bf16", _cut_shard, "cut off"),
    ("bf16", _lost_shard, "which is missing"),
    ("bf16", _index_leads_out, "which is no shard"),
    ("bf16", _lost_code, "configuration.py is not the shipped code"),
    ("nvfp4", _other_patterns, "exclude_modules"),
    ("nvfp4", _other_algorithm, "quantization_config is of another kind"),
    ("bf16", _other_end, "generation_config.json"),
    ("bf16", _adds_start, "add_bos_token"),
    ("bf16", _other_tile, "force_image_size"),
]


@pytest.mark.parametrize(
    ("kind", "damage", "words"), DAMAGES, ids=[d[1].__name__.strip("_") for d in DAMAGES]
)
def test_damage_is_caught_and_named(
    releases: dict[str, Path],
    source: StageSource,
    tmp_path: Path,
    kind: str,
    damage: Callable[[Path], str],
    words: str,
) -> None:
    folder = shutil.copytree(releases[kind], tmp_path / kind)
    check = damage(folder)
    found = failed(look(folder, source)[0])
    assert check in found, found
    assert words in found[check], found[check]


@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_the_undamaged_copy_passes(
    releases: dict[str, Path], source: StageSource, tmp_path: Path, kind: str
) -> None:
    """Also with its hashes renewed, so that none of the above comes from that."""
    folder = shutil.copytree(releases[kind], tmp_path / kind)
    renew(folder)
    assert not failed(look(folder, source)[0])

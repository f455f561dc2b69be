"""Calibrated inputs: against transformers' own linears, and tied to their checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from checkpoint_tools.calibrate import calibrate
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.published_config import published_config
from checkpoint_tools.quantized_layout import INPUT_AMAX
from megatron_vl.config.load import load_stage
from megatron_vl.data.pack import Pack
from megatron_vl.train.calibrate import planned_packs
from tests.checkpoint_tools.conftest import quiet
from tests.checkpoint_tools.published import read_all
from tests.checkpoint_tools.served import served_tensors
from tests.conftest import SmallData

PACKS = 3


@pytest.fixture(scope="module")
def text_stage(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served stage with a blend of text alone, which transformers' decoder can read too."""
    import shutil

    folder = tmp_path_factory.mktemp("text") / "stage"
    shutil.copytree(served, folder)
    config = folder / "config.yaml"
    lines = config.read_text().split("\n")
    kept = [line for line in lines if not line.strip().startswith(("qa: 0.5", "clips: 0.3"))]
    assert len(kept) == len(lines) - 2
    config.write_text("\n".join(kept))
    return folder


@pytest.fixture(scope="module")
def amax(text_stage: Path) -> Path:
    path = text_stage / "amax.safetensors"
    seen: list[str] = []
    made = calibrate(text_stage, path, lambda progress: seen.append(str(progress)), PACKS)
    assert made.packs == PACKS
    assert len(seen) == PACKS
    assert f"{PACKS} of {PACKS} packs, {made.tokens:,} tokens" in seen[-1]
    return path


def documents(pack: Pack) -> list[Tensor]:
    starts = pack.cu_seqlens.tolist()
    return [
        pack.tokens_L[start : start + length]
        for start, length in zip(starts, pack.document_lengths, strict=False)
        if length
    ]


@torch.no_grad()
def test_every_input_is_what_transformers_multiplies(text_stage: Path, amax: Path) -> None:
    """Document by document through NemotronHForCausalLM, the inputs of its nn.Linear modules."""
    config = load_stage(text_stage / "config.yaml")
    llm = published_config(config, config.model.vocab_size, "float32", _ids())["llm_config"]
    decoder = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**llm)).eval()
    prefix = "language_model."
    decoder.load_state_dict(
        {
            name.removeprefix(prefix).replace("backbone.", "model."): tensor
            for name, tensor in served_tensors(config).items()
            if name.startswith(prefix)
        }
    )
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and "mixer" in name:
            module.register_forward_pre_hook(watch(name.replace("model.", "backbone.", 1)))
    for pack in planned_packs(config, "train", PACKS):
        for tokens in documents(pack):
            decoder(tokens.unsqueeze(0))
    found = {name: float(value) for name, value in read_all(amax.parent).items()}
    assert found.keys() == {prefix + name + INPUT_AMAX for name in largest}
    for name, value in largest.items():
        assert found[prefix + name + INPUT_AMAX] == pytest.approx(value, rel=1e-4), name
    assert len(set(found.values())) > 8


def _ids() -> Any:
    from checkpoint_tools.published_config import TokenIds

    return TokenIds(begin=1, end_of_turn=2, pad=0, image=3, video=4)


def test_the_file_says_what_it_is_and_is_the_same_again(
    text_stage: Path, amax: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    made = calibrate(text_stage, again, quiet, PACKS)
    assert again.read_bytes() == amax.read_bytes()
    with safe_open(amax, "pt") as file:
        said = {name: str(value) for name, value in vars(made).items()}
        assert file.metadata() == {"format": "pt", **said}
    fewer = tmp_path / "fewer.safetensors"
    calibrate(text_stage, fewer, quiet, 1)
    smaller, larger = read_all(tmp_path), read_all(amax.parent)
    assert any(smaller[name] < larger[name] for name in larger)
    assert all(smaller[name] <= larger[name] for name in larger)
    with pytest.raises(ConversionError, match="exists already"):
        calibrate(text_stage, again, quiet, PACKS)


def test_an_amax_of_another_checkpoint_is_refused(
    stage_folder: Path, amax: Path, small_data: SmallData, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"was measured on another checkpoint \(digest"):
        export(stage_folder, tmp_path / "out", ExportOptions("fp8", amax=amax), quiet)
    assert not (tmp_path / "out").exists()

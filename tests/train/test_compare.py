"""Records of two layouts: joined from shards, compared in the order of the computation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vl.train.compare import FLOAT32_BOUNDS, PRECISION_MARGIN, Record, findings

GENERATOR = torch.Generator().manual_seed(61)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def computed() -> dict[str, Tensor]:
    """What one rank would write of two packs and three layers."""
    made = {}
    for pack in (0, 1):
        made[f"pack.{pack}.embedded"] = normal(12, 1, 4)
        for layer in range(3):
            made[f"pack.{pack}.layer.{layer:03d}"] = normal(12, 1, 4)
        made[f"pack.{pack}.token_losses"] = normal(12, 1)
    made["loss.0"] = torch.tensor([2.5], dtype=torch.float64)
    made["gradient.decoder.weight@0x0@6x4"] = normal(6, 4)
    return made


def written(folder: Path, ranks: list[dict[str, Tensor]]) -> Path:
    folder.mkdir()
    for rank, tensors in enumerate(ranks):
        save_file(tensors, folder / f"rank_{rank:05d}.safetensors")
    return folder


def test_shards_are_joined_where_they_belong(tmp_path: Path) -> None:
    whole = normal(6, 4)
    shards = [
        {"gradient.w@3x0@6x4": whole[3:, :2].contiguous(), "loss.0": torch.ones(1)},
        {"gradient.w@0x0@6x4": whole[:3].contiguous()},
        {"gradient.w@3x2@6x4": whole[3:, 2:].contiguous()},
    ]
    record = Record(written(tmp_path / "a", shards))
    assert record.names() == {"gradient.w", "loss.0"}
    assert torch.equal(record.tensor("gradient.w"), whole)


def test_a_part_that_nobody_wrote_is_no_match(tmp_path: Path) -> None:
    """Missing places are not a number, and that is never within a bound."""
    whole = {"gradient.w@0x0@6x4": normal(6, 4)}
    part = {"gradient.w@0x0@6x4": whole["gradient.w@0x0@6x4"][:5].contiguous()}
    found = findings(written(tmp_path / "layout", [part]), written(tmp_path / "one", [whole]), None)
    assert [finding.holds for finding in found] == [False]


def test_the_first_layer_that_differs_comes_first(tmp_path: Path) -> None:
    one = computed()
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["pack.1.layer.001"][3] += 0.5
    other["pack.1.layer.002"][3] += 0.5
    other["gradient.decoder.weight@0x0@6x4"] += 0.5
    found = findings(written(tmp_path / "layout", [other]), written(tmp_path / "one", [one]), None)
    assert [finding.name for finding in found] == [
        "embedded", "layer.000", "layer.001", "layer.002", "token_losses", "loss.0",
        "gradient.decoder.weight",
    ]  # fmt: skip
    off = [finding.name for finding in found if not finding.holds]
    assert off == ["layer.001", "layer.002", "gradient.decoder.weight"]
    expected = float(torch.full((1, 4), 0.5).norm() / one["pack.1.layer.001"].norm())
    assert found[2].difference == pytest.approx(expected, rel=1e-5)
    assert found[2].bound == FLOAT32_BOUNDS["layer"]


def test_lower_precision_is_allowed_what_it_costs_on_one_rank(tmp_path: Path) -> None:
    exact = computed()
    one = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in exact.items()}
    near = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in one.items()}
    far = {name: tensor + 0.08 * torch.randn_like(tensor) for name, tensor in one.items()}
    folders = {
        name: written(tmp_path / name, [tensors])
        for name, tensors in (("exact", exact), ("one", one), ("near", near), ("far", far))
    }
    layers = [
        finding
        for finding in findings(folders["near"], folders["one"], folders["exact"])
        if not finding.name.startswith("loss")
    ]
    assert all(finding.holds for finding in layers)
    # The bound is that of the pack that comes nearest to it.
    costs = [
        float((one[name] - exact[name]).norm() / exact[name].norm())
        for name in ("pack.0.embedded", "pack.1.embedded")
    ]
    assert layers[0].bound in [pytest.approx(PRECISION_MARGIN * cost, rel=1e-5) for cost in costs]
    assert not any(
        finding.holds
        for finding in findings(folders["far"], folders["one"], folders["exact"])
        if finding.name.startswith("layer")
    )


def test_records_of_different_things_are_refused(tmp_path: Path) -> None:
    one = computed()
    other = {name: tensor for name, tensor in one.items() if "layer.002" not in name}
    with pytest.raises(ValueError, match=r"differ in 2 tensors, the first: pack\.0\.layer\.002"):
        findings(written(tmp_path / "layout", [other]), written(tmp_path / "one", [one]), None)
    with pytest.raises(ValueError, match="the ranks have written nothing"):
        Record(tmp_path / "nowhere")

"""Files written in any order, read by the libraries whose formats they are."""

import hashlib
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools import safetensors_file, torch_dist
from checkpoint_tools.planned_file import FilePlan, PlannedFile
from checkpoint_tools.safetensors_file import TensorSpec


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "large": torch.randn(700, 900, generator=generator),  # more than two blocks
        "bfloat16": torch.randn(33, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "fp8": torch.randn(6, 2, generator=generator).to(torch.float8_e4m3fn),
        "index": torch.randint(0, 1 << 40, (3,), generator=generator),
    }


def specs(held: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in held.items()}


def write_and_finish(file: PlannedFile, held: dict[str, Tensor]) -> None:
    for name, tensor in held.items():
        file.write(name, tensor)
    file.finish()


def write(path: Path, plan: FilePlan, held: dict[str, Tensor]) -> None:
    """From three threads, the last tensor first."""
    file = PlannedFile(path, plan)
    with ThreadPoolExecutor(3) as pool:
        hashes = dict(
            zip(
                reversed(held),
                pool.map(lambda n: file.write(n, held[n]), reversed(held)),
                strict=True,
            )
        )
    file.finish()
    for name, tensor in held.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert hashes[name] == hashlib.sha256(data).hexdigest()
    assert path.stat().st_size == plan.size
    assert plan.frame_stands(path)


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def members(archive: bytes) -> list[tuple[str, int, int]]:
    """Name, place and size of each member of a zip file."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [(m.filename, m.header_offset, m.file_size) for m in opened.infolist()]


def test_safetensors_reads_it(tmp_path: Path) -> None:
    held = tensors()
    write(tmp_path / "a.safetensors", safetensors_file.plan_file(specs(held)), held)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == held.keys()
    assert all(same(found[name], tensor) for name, tensor in held.items())


def test_torch_reads_every_archive(tmp_path: Path) -> None:
    held = tensors()
    write(tmp_path / "a.distcp", torch_dist.plan_file(specs(held)), held)
    data = (tmp_path / "a.distcp").read_bytes()
    places = torch_dist.archive_places(specs(held))
    assert sum(length for _, length in places.values()) == len(data)
    for name, (offset, length) in places.items():
        archive = data[offset : offset + length]
        assert same(torch.load(io.BytesIO(archive), weights_only=True), held[name])
        own = io.BytesIO()
        torch.save(held[name], own)
        assert members(archive) == members(own.getvalue())


def test_a_changed_frame_is_seen(tmp_path: Path) -> None:
    held = tensors()
    plan = torch_dist.plan_file(specs(held))
    write(tmp_path / "a.distcp", plan, held)
    with (tmp_path / "a.distcp").open("r+b") as file:
        file.seek(plan.size - 3)
        file.write(b"x")
    assert not plan.frame_stands(tmp_path / "a.distcp")


def test_an_error_of_an_early_flush_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a failed write to one fsync and not to the next."""
    errors = [OSError(5, "Input/output error")]

    def fsync(_: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr("checkpoint_tools.planned_file._FLUSH_BYTES", 1)
    monkeypatch.setattr("os.fsync", fsync)
    held = {"one": torch.ones(4)}
    file = PlannedFile(tmp_path / "a.safetensors", safetensors_file.plan_file(specs(held)))
    try:
        with pytest.raises(OSError, match="Input/output error"):
            write_and_finish(file, held)
    finally:
        file.close()

"""What breaks outside, met by a user: one clear message that names the thing and the way out.

Where a run had started: a receipt that says `failed`, the last good checkpoint as it was, and a
resume that goes on from it. Each fault passes through the real command and the real trainer.
"""

import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from launch import exit_codes
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import Receipt
from tests.conftest import DRAWN, LAPTOP, SmallData
from tests.faults.conftest import Warm
from tests.faults.killing import TINY_MODEL

pytestmark = pytest.mark.distributed

STEPS = 4
TINY = (
    "parallel.data=1",
    "train.global_batch=1",
    "data.sequence_length=256",
    f"train.steps={STEPS}",
    "evaluation.every=0",
    "evaluation.batches=1",
    "evaluation.packs=1",
    "checkpoint.every=2",
    *TINY_MODEL,
)


def submit(warm: Warm, run: Path, data: str, *overrides: str, **limits: int) -> tuple[int, str]:
    arguments = ["submit", DRAWN, "--run", run, "--follow", data, *TINY, *overrides]
    ended = warm.mvl(*arguments, **limits)
    return ended.code, ended.said


def receipt_of(run: Path) -> tuple[StageFolder, Receipt]:
    stage = RunFolder(run).stages()[0]
    receipt = stage.receipt()
    assert receipt is not None
    return stage, receipt


@pytest.fixture(scope="module")
def started(warm: Warm, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped by a full disk quota in its second save; the first is good."""
    run = tmp_path_factory.mktemp("started") / "run"
    code, said = submit(warm, run, small_data.override)
    assert code == exit_codes.OK, said
    stage, _ = receipt_of(run)
    stage.receipt_path.unlink()
    shutil.rmtree(stage.checkpoints / f"step_{STEPS:06d}")
    return run


def copied(started: Path, tmp_path: Path) -> Path:
    shutil.copytree(started, tmp_path / "run")
    return tmp_path / "run"


def test_a_full_disk_inside_a_shard(warm: Warm, small_data: SmallData, tmp_path: Path) -> None:
    """A file system that has room for one checkpoint and not for the second."""
    disk = tmp_path / "disk"
    problem = warm.mount(disk, 6 << 20) if warm.can_mount else "no mount namespaces here"
    if problem:
        pytest.skip(f"no file system of limited size: {problem}; see the next test")
    run = disk / "run"
    code, said = submit(warm, run, small_data.override)
    assert code == exit_codes.FAILED, said
    assert "No space left on device" in said
    assert "step_000004" in said
    # The server alone sees that disk.
    shown = warm.mvl("status", run).said
    assert "failed" in shown
    before = warm.digest(run / "stages/00_init/checkpoints/step_000002")
    assert warm.mount(disk, 64 << 20) == ""
    ended = warm.mvl("resume", run, "--follow")
    assert ended.code == exit_codes.OK, ended.said
    assert "goes on after step 2" in ended.said
    assert warm.digest(run / "stages/00_init/checkpoints/step_000002") == before


def test_a_file_may_not_grow_further_inside_a_shard(
    warm: Warm, small_data: SmallData, started: Path, tmp_path: Path
) -> None:
    """The same path where nothing can be mounted: a limit on the size of a file."""
    run = copied(started, tmp_path)
    ended = warm.mvl("resume", run, "--follow", file_bytes=200_000)
    assert ended.code == exit_codes.FAILED, ended.said
    stage, receipt = receipt_of(run)
    assert receipt.status == "failed"
    for part in ("step_000004", "File too large", "is untouched"):
        assert part in receipt.reason
        assert part in ended.said
    names = sorted(path.name for path in stage.checkpoints.iterdir())
    assert names == ["step_000002"]
    good = stage.checkpoints / "step_000002"
    assert warm.digest(good) == warm.digest(
        RunFolder(started).stages()[0].checkpoints / "step_000002"
    )
    ended = warm.mvl("resume", run, "--follow")
    assert ended.code == exit_codes.OK, ended.said


def test_a_corrupt_image_in_a_shard(
    warm: Warm, small_data: SmallData, started: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data.root, data)
    harmed = break_images(data / "captions")
    code, said = submit(
        warm,
        tmp_path / "run",
        f"data.root={data}",
        "data.max_bad_fraction=0.0",
        "train.steps=40",
    )
    assert code == exit_codes.FAILED, said
    _, receipt = receipt_of(tmp_path / "run")
    assert receipt.status == "failed"
    for part in ("source captions", "cannot be decoded", "data.max_bad_fraction"):
        assert part in receipt.reason
    assert any(name.partition(".")[0] in receipt.reason for name in harmed)


def break_images(source: Path) -> list[str]:
    """Overwrite the middle of every picture of a source, in its shards; returns their names."""
    names = []
    for shard in sorted(source.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = [m for m in tar if m.name.endswith((".png", ".jpg", ".jpeg"))]
        with shard.open("rb+") as file:
            for member in members:
                names.append(member.name)
                file.seek(member.offset_data + 40)
                file.write(b"\x00" * (member.size - 60))
    assert names
    return names


def test_a_truncated_checkpoint_of_the_stage_before(
    warm: Warm, small_data: SmallData, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe_folder = tmp_path / "recipe"
    recipe_folder.mkdir()
    for name, base in (("init", DRAWN), ("stage0", LAPTOP / "stage0.yaml")):
        (recipe_folder / f"{name}.yaml").write_text(f"base: {base}\n")
    recipe = ["submit", recipe_folder, "--run", run, "--follow", small_data.override, *TINY]
    ended = warm.mvl(*recipe, "--until", "init")
    assert ended.code == exit_codes.OK, ended.said
    stage, receipt = receipt_of(run)
    shard = max(stage.checkpoint_path(receipt).glob("*.distcp"), key=lambda p: p.stat().st_size)
    with shard.open("rb+") as file:
        file.truncate(shard.stat().st_size // 2)
    ended = warm.mvl(*recipe, "--from", "stage0", "--until", "stage0")
    assert ended.code == exit_codes.HELD, ended.said
    for part in ("stage0 must not start from", str(stage.checkpoint_path(receipt)), "digest",
                 "run init again"):  # fmt: skip
        assert part in ended.said
    assert RunFolder(run).stage("stage0").last_attempt() == 0


def test_a_busy_port(warm: Warm, started: Path, tmp_path: Path) -> None:
    run = copied(started, tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = warm.mvl("resume", run, "--follow", port=port)
    assert ended.code == exit_codes.FAILED, ended.said
    stage, receipt = receipt_of(run)
    assert receipt.status == "failed"
    assert f"port {port} of 127.0.0.1 is taken" in receipt.reason
    assert "mvl resume" in receipt.reason
    ended = warm.mvl("resume", run, "--follow")
    assert ended.code == exit_codes.OK, ended.said
    assert (stage.checkpoints / "step_000004").is_dir()


def test_a_missing_dataset(
    warm: Warm, small_data: SmallData, started: Path, tmp_path: Path
) -> None:
    """Before the start, and between a start and a resume."""
    gone = tmp_path / "gone"
    code, said = submit(warm, tmp_path / "new", f"data.root={gone}")
    assert code == exit_codes.USAGE
    assert f"data.root is {gone}: no such folder" in said
    assert "mvl data prepare" in said
    assert not (tmp_path / "new" / "stages").exists()

    run = copied(started, tmp_path)
    stage = RunFolder(run).stages()[0]
    text = stage.config_path.read_text()
    stage.config_path.write_text(text.replace(str(small_data.root), str(gone)))
    ended = warm.mvl("resume", run, "--follow")
    assert ended.code == exit_codes.FAILED, ended.said
    _, receipt = receipt_of(run)
    assert receipt.status == "failed"
    assert str(gone) in receipt.reason
    assert (stage.checkpoints / "step_000002").is_dir()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("parallel.tensor=3", ("parallel.tensor", "3", "nearest valid")),
        ("trian.steps=3", ("trian", "nearest valid key", "train.steps")),
        ("train.steps=many", ("train.steps", "many", "int")),
    ],
    ids=["a-tensor-size-that-does-not-divide", "a-typo", "a-wrong-type"],
)
def test_a_value_that_cannot_be(
    warm: Warm, small_data: SmallData, tmp_path: Path, override: str, named: tuple[str, ...]
) -> None:
    code, said = submit(warm, tmp_path / "run", small_data.override, override)
    assert code == exit_codes.USAGE
    for part in named:
        assert part in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_typo_in_a_file_is_named_with_its_line(
    warm: Warm, small_data: SmallData, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    file = recipe / "init.yaml"
    for text, named in (
        (f"base: {DRAWN}\ntrian:\n  steps: 2\n", ("init.yaml:2", "trian", "train")),
        (f"base: {DRAWN}\ntrain: [steps\n", ("init.yaml", "line")),
    ):
        file.write_text(text)
        ended = warm.mvl("submit", file, "--run", tmp_path / "run", small_data.override)
        assert ended.code == exit_codes.USAGE, ended.said
        for part in named:
            assert part in ended.said
        assert "Traceback" not in ended.said

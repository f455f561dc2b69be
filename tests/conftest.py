"""What the whole test run shares: one small data set, one short run, one pool of ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.ranks import RankPool

if TYPE_CHECKING:
    from megatron_vl.config.schema import StageConfig
    from megatron_vl.model.vlm import VisionLanguageModel
    from megatron_vl.run.folder import StageFolder

REPOSITORY = Path(__file__).resolve().parents[1]
LAPTOP = REPOSITORY / "stages" / "laptop"
# A training stage that starts from drawn weights and so needs no parent.
DRAWN = REPOSITORY / "tests" / "support" / "stages" / "init.yaml"
# The smallest step there is: one rank, one short pack.
TINY = ("parallel.data=1", "train.global_batch=1", "data.sequence_length=256")


def pytest_configure() -> None:
    """Let signals arrive: what the tests start inherits this process's mask and what it ignores.

    Whoever started the test run may have blocked SIGTERM, and then nothing it ends would end, or
    have it ignore SIGHUP, as nohup does.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class SmallData:
    """A small prepared data set of the laptop recipe, as an override of its root."""

    root: Path

    @property
    def override(self) -> str:
        return f"data.root={self.root}"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Every source of the laptop recipe, a few dozen samples each."""
    from megatron_vl.config.load import load_stage
    from megatron_vl.data.prepare import prepare_laptop

    root = tmp_path_factory.mktemp("small") / "laptop"
    config = load_stage(LAPTOP / "stage1.yaml", [f"data.root={root}"])
    sizes = {
        "captions": 60,
        "ocr": 60,
        "qa": 60,
        "clips": 16,
        "code": 60,
        "text": 60,
        "long_text": 12,
    }
    prepare_laptop(config.data, config.model, seed=11, sizes=sizes, progress=lambda line: None)
    return SmallData(root)


@dataclass(frozen=True)
class ShortRun:
    """The laptop recipe, a few steps a stage, run by `mvl submit` from another directory.

    Attributes:
        path: the run folder.
        overrides: what it was submitted with.
        output: what `mvl submit --follow` printed.
        selection: the words that leave out what a few steps cannot pass: gates and what they guard.
    """

    path: Path
    overrides: tuple[str, ...]
    output: str
    selection: tuple[str, ...] = (
        "--until", "stage4", "--skip", "code_stage1", "--skip", "code_stage3",
    )  # fmt: skip

    @property
    def trained(self) -> "list[StageFolder]":
        """The stages that trained: 0 to 4."""
        from megatron_vl.run.folder import RunFolder

        return [RunFolder(self.path).stage(f"stage{number}") for number in range(5)]


def mvl(
    *arguments: str, check: bool = True, seconds: float = 420
) -> subprocess.CompletedProcess[str]:
    """Run the `mvl` command in a process of its own, from the repository's root.

    Args:
        seconds: a command that hangs is ended then; several times what a busy machine takes.
    """
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"mvl {' '.join(arguments)}\n{done.stdout}"
    return done


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, small_data: SmallData) -> ShortRun:
    """init assembled, then stages 0-4, three steps each, on one rank."""
    path = tmp_path_factory.mktemp("runs") / "short"
    overrides = (
        small_data.override,
        "train.steps=3",
        "train.global_batch=2",
        "evaluation.every=0",
        "evaluation.batches=1",
        "evaluation.packs=1",
        "parallel.data=1",
        "parallel.context=1",
    )
    selection = ShortRun.selection
    done = mvl("submit", str(LAPTOP), "--run", str(path), "--follow", *selection, *overrides)
    return ShortRun(path, overrides, done.stdout)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real gloo ranks that stay up for the whole test run."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def config() -> "StageConfig":
    """Stage 1 of the laptop recipe on one rank in float32."""
    from megatron_vl.config.load import load_stage

    return load_stage(LAPTOP / "stage1.yaml", ["parallel.data=1", "precision=fp32"])


@pytest.fixture(scope="module")
def model(config: "StageConfig") -> Iterator["VisionLanguageModel"]:
    """Its model on this process, every weight away from its start (see `perturbed_model`)."""
    from tests.support.models import perturbed_model

    with perturbed_model(config) as module:
        yield module

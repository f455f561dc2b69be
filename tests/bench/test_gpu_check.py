"""`make gpu-check` runs: its parts, at tiny sizes, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.model import stage
from megatron_vl.train.allocate import build_rank
from megatron_vl.train.synthetic import Kind, samples_of
from tests.conftest import REPOSITORY


def smoke(out: Path, *parts: str) -> str:
    only = [word for part in parts for word in ("--only", part)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--smoke", "--out", str(out), *only],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert not out.exists(), "a trial leaves no results"
    return done.stdout


def test_kernels(tmp_path: Path) -> None:
    said = smoke(tmp_path / "results", "ssd", "fp8")
    assert "| ssd | torch, packed from separate documents |" in said
    # The bytes are the same ones the emulation multiplies, so on a CPU nothing differs.
    assert "| fp8 | in_proj, blockwise, from the same bytes in float32 | 0 relative |" in said


@pytest.mark.slow
def test_the_model(tmp_path: Path) -> None:
    said = smoke(tmp_path / "results", "exact", "model")
    assert "| exact | torch kernels, documents that move others | 0 of 9 |" in said
    assert "| exact | gradients that recomputation changes | 0 of" in said
    assert said.count("| tokens/s") + said.count("tokens/s |") == 5


def test_the_stage_it_measures_is_for_one_gpu() -> None:
    """Its base is the published recipe, which is for many."""
    for length in (4096, 16384):
        config = stage(False, "precision=fp8_blockwise", f"data.sequence_length={length}")
        assert config.parallel.ranks == 1
        assert len(samples_of(config, 0)) >= len(Kind)
    built = build_rank(config, 0)
    assert built.layers == config.model.decoder.pattern
    assert built.bytes.weights + built.bytes.gradients + built.bytes.optimizer < 64 * 2**30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=REPOSITORY, text=True, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no GPU here; --smoke tries the bench without one" in done.stdout

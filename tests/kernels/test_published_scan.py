"""The published Triton kernels, run by Triton's interpreter on a CPU, beside the project's.

What a machine with CUDA takes for its scan (`engine.hybrid_stack.scan_kernel`) is called with the
arguments it is called with there. Skipped where mamba_ssm or Triton is not installed; neither is a
package of this project. mamba_ssm without its CUDA extension is enough:

    pip install --no-deps triton==3.9.0
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \\
        pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
"""

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mamba_ssm", "triton")),
    reason="mamba_ssm or Triton is not installed",
)


@pytest.mark.parametrize("case", ["scan", "fused", "update", "norm"])
def test_published_kernels_compute_the_same(case: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.published", case],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{case}: the same" in done.stdout

"""Importing the engine leaves the machine as it was: no stand-in stays behind."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPT = """
import importlib.util, json, sys
names = ("triton", "mamba_ssm", "causal_conv1d", "transformer_engine")
before = {name: importlib.util.find_spec(name) is not None for name in names}
import torch
compile_before = torch.compile
import megatron_vl.engine
from megatron.core.ssm import mamba_mixer
from torch.utils._triton import has_triton_package
from transformers.utils import import_utils
asked = ("triton", "mamba_ssm", "mamba_2_ssm", "causal_conv1d")
print(json.dumps({
    "before": before,
    "after": {name: importlib.util.find_spec(name) is not None for name in names},
    "without_loader": [
        name for name, module in list(sys.modules.items())
        if name.split(".")[0] in names and module.__spec__.loader is None
    ],
    "present": sorted({name.split(".")[0] for name in sys.modules} & set(names)),
    "torch_sees_triton": has_triton_package(),
    "transformers": {n: bool(getattr(import_utils, f"is_{n}_available")()) for n in asked},
    "mixer_has_kernels": mamba_mixer.HAVE_MAMBA_SSM,
    "cuda": torch.cuda.is_available(),
    "compile_is_back": torch.compile is compile_before,
}))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, object]:
    """What a fresh process sees after it has imported the engine."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_stand_in_stays_in_sys_modules(seen: dict) -> None:
    assert seen["after"] == seen["before"]
    assert seen["without_loader"] == []
    assert set(seen["present"]) <= {name for name, found in seen["before"].items() if found}


def test_other_libraries_see_the_machine_as_it_is(seen: dict) -> None:
    assert seen["torch_sees_triton"] == seen["before"]["triton"]
    for name, available in seen["transformers"].items():
        package = "mamba_ssm" if name.startswith("mamba") else name
        assert not available or seen["before"][package], name
    assert seen["compile_is_back"]


def test_the_mixer_has_kernels_all_the_same(seen: dict) -> None:
    """megatron-core's mixer refuses to be built when it found none while it was imported."""
    assert seen["mixer_has_kernels"]

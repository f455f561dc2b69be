"""One random published folder, and the stage folder that import makes of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from megatron_vl.config.schema import StageConfig
from tests.checkpoint_tools.published import (
    random_tensors,
    tiny_stage,
    tokenizer_text,
    write_published,
)
from tests.conftest import SmallData

SHARD_BYTES = 300_000


def quiet(progress: object) -> None:
    """Takes progress reports."""


@dataclass(frozen=True)
class Published:
    """A random folder in float32 and what it holds."""

    folder: Path
    stage: StageConfig
    tensors: dict[str, Tensor]
    tokenizer: str


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    base = tmp_path_factory.mktemp("published")
    stage, text = tiny_stage(), tokenizer_text(base)
    tensors = random_tensors(stage.model)
    return Published(write_published(base / "random", stage, tensors, text), stage, tensors, text)


@pytest.fixture(scope="session")
def stage_folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, imported."""
    out = tmp_path_factory.mktemp("imported") / "stage"
    import_folder(published.folder, out, None, 1, quiet)
    return out


@pytest.fixture(scope="session")
def release(stage_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage folder, exported in float32 and several shards."""
    out = tmp_path_factory.mktemp("released") / "release"
    export(stage_folder, out, ExportOptions("fp32", SHARD_BYTES), quiet)
    return out


@pytest.fixture(scope="session")
def served(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage folder that has data and answers firmly (see `served.py`)."""
    from tests.checkpoint_tools.served import served_stage

    return served_stage(tmp_path_factory.mktemp("served"), small_data.root)


def _no_network(*_: object) -> None:
    raise OSError("a test of a published folder reached for the network")


@pytest.fixture(scope="session")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers keeps the shipped code; one for the whole run, as modules stay loaded."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="module")
def offline(code_cache: Path) -> Iterator[None]:
    """No network, and nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(code_cache))
        patch.setattr("socket.socket.connect", _no_network)
        patch.syspath_prepend(str(code_cache))
        yield


@pytest.fixture(scope="module")
def processor(release: Path, offline: None) -> Any:
    """The shipped processor, opened as its readers open it."""
    import transformers

    return transformers.AutoProcessor.from_pretrained(release, trust_remote_code=True)

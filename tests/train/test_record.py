"""`mvl check` on real ranks: a sound layout is found equal, a spoilt layer is named."""

import json
from pathlib import Path

import pytest

from megatron_vl.train.compare import findings
from tests.conftest import LAPTOP, mvl
from tests.support.ranks import RankPool
from tests.train import check_jobs

pytestmark = pytest.mark.distributed

STAGE = LAPTOP / "stage1.yaml"
COMMON = ["parallel.data=1", "train.global_batch=2", "data.document_alignment=4"]
LAYOUT = ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "one"
    ranks.run(1, check_jobs.sound, STAGE, COMMON, folder)
    return folder


def test_a_sound_layout_is_equal(ranks: RankPool, one_rank: Path, tmp_path: Path) -> None:
    ranks.run(4, check_jobs.sound, STAGE, [*COMMON, *LAYOUT], tmp_path / "layout")
    found = findings(tmp_path / "layout", one_rank, None)
    assert [finding.name for finding in found if not finding.holds] == []
    names = {finding.name for finding in found}
    assert {"embedded", "layer.000", "layer.003", "token_losses", "loss.2"} <= names
    assert "gradient.language_model.decoder.layers.0.mixer.in_proj.weight.x" in names
    assert "gradient.vision_projection.encoder.linear_fc2.weight" in names


def test_the_spoilt_layer_is_named(ranks: RankPool, one_rank: Path, tmp_path: Path) -> None:
    """A scan that runs on over document borders, on one rank of four."""
    ranks.run(4, check_jobs.spoilt, STAGE, [*COMMON, *LAYOUT], tmp_path / "layout")
    off = [f.name for f in findings(tmp_path / "layout", one_rank, None) if not f.holds]
    assert off[0] == "layer.000"
    assert "token_losses" in off


@pytest.mark.slow
def test_the_command() -> None:
    """The README's example is the quick sibling."""
    overrides = [*COMMON, "parallel.pipeline=2", "precision=bf16"]
    done = mvl("check", str(STAGE), "--json", *overrides)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["equal"] is True
    assert len(answer["findings"]) > 50


def test_the_command_refuses_what_it_cannot_compare() -> None:
    done = mvl("check", str(STAGE), "parallel.data=1", check=False)
    assert done.returncode == 2
    assert "set an axis, as in parallel.tensor=2" in done.stdout
    done = mvl("check", str(STAGE), "parallel.tensor=3", check=False)
    assert done.returncode == 2
    assert "nearest valid: parallel.tensor 2" in done.stdout

"""The rules of a distillation stage, each refused with the nearest value that keeps it."""

import pytest

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from tests.conftest import LAPTOP


def problems(*overrides: str) -> list[str]:
    try:
        load_stage(LAPTOP / "qad_nvfp4.yaml", overrides)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("overrides", "asked", "nearest"),
    [
        (["distill.temperature=0"], "distill.temperature is 0", "1.0"),
        (["distill.calibration_batches=0"], "distill.calibration_batches is 0", "1"),
        (["precision=fp8_blockwise"], "already quantizes", "precision bf16"),
        (["carry.weights=random"], "needs a teacher", "carry.weights previous"),
        (["carry.fresh=[projector]"], "carry.fresh draws projector", "carry.fresh []"),
        (["train.trainable=[projector]"], "leaves it frozen", "with decoder"),
        (["model.decoder.hidden_size=120"], "hidden_size is 120, must be a multiple of 16", "128"),
        (
            ["parallel.tensor=2", "parallel.data=1", "model.decoder.ffn_hidden_size=528"],
            "ffn_hidden_size is 528, must be a multiple of 16 times parallel.tensor 2",
            "512",
        ),
    ],
)
def test_refused(overrides: list[str], asked: str, nearest: str) -> None:
    found = [text for text in problems(*overrides) if asked in text]
    assert len(found) == 1, problems(*overrides)
    assert found[0].endswith(f"nearest valid: {nearest}") or found[0].endswith(nearest)


def test_accepted() -> None:
    assert problems() == []
    assert problems("precision=bf16", "parallel.tensor=2", "parallel.data=1") == []
    assert problems("distill.student=none", "carry.weights=random") == []
    assert problems("distill.student=fp8", "model.decoder.hidden_size=120") == []

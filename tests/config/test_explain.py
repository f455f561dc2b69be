"""Every key explains itself, and says who set it."""

import re
from pathlib import Path

import pytest

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.explain import explain
from megatron_vl.config.fields import all_fields, leaf_fields, nearest_key

STAGE = Path(__file__).parents[2] / "stages" / "laptop" / "stage0.yaml"
ROOMS = {"config", "model", "data", "train", "engine", "kernels", "run", "launch"}


def test_every_field_has_a_sentence_a_unit_and_a_reader() -> None:
    for key, field in all_fields().items():
        sentence, unit, reader = field.sentence, field.unit, field.reader
        assert re.fullmatch(r"[A-Z].+[.]", sentence), key
        assert unit, key
        assert {room.strip() for room in reader.split(",")} <= ROOMS, key


def test_no_two_keys_share_a_sentence_in_a_section() -> None:
    seen = [(key.rpartition(".")[0], field.sentence) for key, field in all_fields().items()]
    assert len(seen) == len(set(seen))


def test_explanation_says_value_and_origin() -> None:
    found = explain(STAGE, "optimizer.lr")
    assert (found.value, found.unit, found.reader) == (3e-3, "1", "train")
    line = STAGE.read_text().splitlines()[int(found.origin.rpartition(":")[2]) - 1]
    assert line.strip().startswith("lr:")
    assert "set by" in found.text()


def test_explanation_of_override_default_section_and_source() -> None:
    assert "override" in explain(STAGE, "train.steps", ["train.steps=5"]).origin
    assert explain(STAGE, "optimizer.epsilon").origin == "default"
    assert explain(STAGE, "data.blend.ocr").key == "data.blend"
    section = explain(STAGE, "optimizer")
    assert section.value["optimizer.lr"] == 3e-3
    assert "optimizer.lr = 0.003" in section.text()


def test_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'optimizer\.warmup_fraction'"):
        explain(STAGE, "optimizer.warmup")


def test_every_key_is_nearest_to_itself_misspelt() -> None:
    for key in leaf_fields():
        assert nearest_key(key + "x") == key

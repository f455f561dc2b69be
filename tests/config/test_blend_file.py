"""Blend files: read with their lines, put into the stage, refused with the nearest valid word."""

from pathlib import Path

import pytest

from megatron_vl.config.blend_file import read_blend_file
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.explain import explain
from megatron_vl.config.load import config_hash, load_stage, to_yaml
from megatron_vl.config.load_node import node_kind
from megatron_vl.config.schema_data import BlendUnit, SourceEnd

STAGES = Path(__file__).parents[2] / "stages"
STAGE = STAGES / "laptop" / "stage1.yaml"
BLEND = """\
unit: tokens
when_source_ends: stop
sources:
  text: {weight: 2, epochs: 1.5, samples: 100, url: "https://example.org", licence: MIT, note: x}
  code: {weight: 0.5}
missing:
  - {name: films, tokens: 1000000000, note: nobody has them}
"""


def write(folder: Path, blend: str = BLEND, data: str = "blend_file: mixes/one.yaml") -> Path:
    (folder / "mixes").mkdir(exist_ok=True)
    (folder / "mixes" / "one.yaml").write_text(blend)
    path = folder / "stage1.yaml"
    path.write_text(f"base: {STAGE}\ndata:\n  {data}\n")
    return path


def test_a_stage_holds_what_its_blend_file_says(tmp_path: Path) -> None:
    path = write(tmp_path)
    config = load_stage(path)
    assert config.data.blend == {"text": 2.0, "code": 0.5}
    assert config.data.epochs == {"text": 1.5}
    assert config.data.blend_unit is BlendUnit.tokens
    assert config.data.when_source_ends is SourceEnd.stop
    assert config.data.blend_file == ""
    assert explain(path, "data.epochs").origin == f"{tmp_path}/mixes/one.yaml:3"
    resolved = tmp_path / "elsewhere" / "config.yaml"
    resolved.parent.mkdir()
    resolved.write_text(to_yaml(config))
    assert load_stage(resolved) == config
    before = config_hash(config)
    write(tmp_path, BLEND.replace("0.5", "0.6"))
    assert config_hash(load_stage(path)) != before
    write(tmp_path, BLEND.replace("note: x", "note: y"))
    assert config_hash(load_stage(path)) == before, "a note changes nothing of a run"


def test_a_blend_set_later_as_a_whole_takes_unit_and_epochs_along(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = load_stage(path, ["data.blend={ocr: 1}"])
    assert whole.data.blend == {"ocr": 1.0}
    assert whole.data.epochs == {}
    assert whole.data.blend_unit is BlendUnit.samples
    one = load_stage(path, ["data.blend.code=3", "data.epochs.code=2"])
    assert one.data.blend == {"text": 2.0, "code": 3.0}
    assert one.data.epochs == {"text": 1.5, "code": 2.0}
    assert one.data.blend_unit is BlendUnit.tokens
    both = load_stage(path, ["data.blend={ocr: 1}", "data.epochs={ocr: 2}"])
    assert both.data.epochs == {"ocr": 2.0}


def test_an_override_may_name_a_blend_file(tmp_path: Path) -> None:
    write(tmp_path)
    config = load_stage(STAGE, [f"data.blend_file={tmp_path}/mixes/one.yaml"])
    assert config.data.blend == {"text": 2.0, "code": 0.5}


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        ("sources:\n  a: {wieght: 1, weight: 1}\n", ("one.yaml:2", "'wieght'", "'weight'")),
        ("sources:\n  a: {epochs: 1}\n", ("one.yaml:2", "expected a mapping with `weight`")),
        ("sources:\n  a: {weight: 0}\n", ("a.weight is 0, must be above 0",)),
        ("sources:\n  a: {weight: yes}\n", ("a.weight is True, expected a number",)),
        ("sources:\n  a: {weight: 1, note: 3}\n", ("a.note is 3, expected text",)),
        ("sources: {}\n", ("names no sources",)),
        ("unit: words\nsources:\n  a: {weight: 1}\n", ("one.yaml:1", "samples, tokens")),
        ("source:\n  a: {weight: 1}\n", ("unknown key 'source'", "'sources'")),
        ("sources:\n  a: {weight: 1}\nmissing: [x]\n", ("expected a mapping with `name`",)),
        ("sources:\n  a: {weight: 1}\n  a: {weight: 2}\n", ("set a second time",)),
    ],
)
def test_what_a_blend_file_may_not_hold(tmp_path: Path, blend: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage(write(tmp_path, blend))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{blend_file: mixes/one.yaml, blend: {a: 1}}", ("keep one of them",)),
        ("{blend_file: mixes/two.yaml}", ("mixes/two.yaml", "does not exist")),
        ("{blend_file: [1]}", ("data.blend_file", "expected text")),
        ("{epochs: {txet: 1}}", ("names 'txet'", "nearest source is 'text'")),
        ("{epochs: {text: 0}}", ("data.epochs.text is 0.0, must be above 0",)),
        ("{max_tiles_per_pack: 5}", ("one image may have 13", "nearest valid: 13")),
        ("{document_alignment: 100}", ("multiple of data.document_alignment 100", "500")),
        ("{max_bad_fraction: 1}", ("must be below 1",)),
        ("{aligned_packs: -1}", ("data.aligned_packs is -1, must be at least 0",)),
        ("{workers: 0}", ("data.workers is 0, must be at least 1",)),
        ("{spare_packs: 20}", ("set data.packer: balanced",)),
        ("{packer: best}", ("best_fit, greedy_knapsack, first_fit, balanced",)),
        ("{order: sorted}", ("aligned, random",)),
    ],
)
def test_rules_of_the_data_section(tmp_path: Path, data: str, words: tuple[str, ...]) -> None:
    write(tmp_path)
    path = tmp_path / "stage1.yaml"
    path.write_text(f"base: {STAGE}\ndata: {data}\n")
    with pytest.raises(ConfigError) as caught:
        load_stage(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", sorted(STAGES.glob("*/blends/*.yaml")), ids=lambda p: str(p.stem))
def test_the_blend_files_of_the_repository_are_sound(path: Path) -> None:
    blend = read_blend_file(path)
    stage = path.parents[1] / path.name
    if stage.exists() and node_kind(stage) is None:
        assert load_stage(stage).data.blend == {s.name: s.weight for s in blend.sources}
    load_stage(STAGE, [f"data.blend_file={path}"])
    if "nano_12b" not in str(path):
        return
    assert blend.missing, "no published mix can be had whole"
    for source in blend.sources:
        assert source.url.startswith("https://") or "not public" in source.note
        if source.epochs and source.samples:
            assert source.weight == pytest.approx(source.samples * source.epochs, abs=1)

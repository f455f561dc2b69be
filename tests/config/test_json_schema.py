"""The JSON schema for editors, held against a validator nobody here wrote."""

import json
from typing import Any

import pytest
import yaml

from launch import exit_codes
from launch.cli import main
from megatron_vl.config.load import load_stage, to_plain
from tests.conftest import LAPTOP, REPOSITORY

jsonschema = pytest.importorskip("jsonschema")
STAGES = sorted((REPOSITORY / "stages").glob("*/*.yaml"))


def schema(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["config", "schema", "--json", *words]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def problems(found: dict[str, Any], value: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(found).iter_errors(value)]


def test_every_file_of_the_repository_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    """As written, and a stage as it resolves."""
    kinds = {"": schema(capsys), "site": schema(capsys, "--site")}
    kinds |= {kind: schema(capsys, "--node", kind) for kind in ("assemble", "evaluate", "release")}
    sites = sorted((REPOSITORY / "slurm/sites").glob("*.yaml"))
    assert len(STAGES) > 15
    for path in [*STAGES, *sites]:
        written = yaml.safe_load(path.read_text())
        kind = "site" if path in sites else written.get("node", "")
        assert problems(kinds[kind], written) == [], path
    assert problems(kinds[""], to_plain(load_stage(LAPTOP / "stage2.yaml"))) == []


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"optimiser": {}}, "'optimiser' was unexpected"),
        ({"optimizer": {"learning_rate": 1.0}}, "'learning_rate' was unexpected"),
        ({"precision": "fp64"}, "is not one of"),
        ({"train": {"steps": "many"}}, "is not of type 'integer'"),
        ({"train": {"trainable": ["eye"]}}, "is not one of"),
        ({"data": {"blend": {"text": "much"}}}, "is not of type 'number'"),
    ],
)
def test_what_a_stage_cannot_hold(
    stage: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = problems(schema(capsys), stage)
    assert words in problem


def test_keys_say_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    found = schema(capsys)
    lr = found["properties"]["optimizer"]["properties"]["lr"]
    assert lr == {"type": "number", "description": "Peak learning rate. [1; train]"}
    beta = found["properties"]["optimizer"]["properties"]["beta2"]
    assert beta["default"] == 0.999

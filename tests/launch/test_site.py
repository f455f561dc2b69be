"""Site files: every key explained, every mistake named with what would be right."""

import re
from pathlib import Path

import pytest

from launch.cli import main
from launch.site import SITES, load_site, site_fields
from launch.site_schema import Launcher, Runtime
from megatron_vl.config.errors import ConfigError


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def refuse(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(str(path))
    return str(caught.value)


def test_the_sites_that_come_along_are_sound() -> None:
    names = sorted(path.stem for path in SITES.glob("*.yaml"))
    assert names == ["example-apptainer", "example-pyxis", "local", "loopback"]
    sites = {name: load_site(name) for name in names}
    assert sites["local"].launcher is Launcher.local
    assert sites["example-pyxis"].container.runtime is Runtime.pyxis
    assert sites["example-apptainer"].container.runtime is Runtime.apptainer
    assert sites["loopback"].nodes.gpus == 0


def test_every_key_has_a_sentence_a_unit_and_a_reader() -> None:
    fields = site_fields()
    assert len(fields) > 35
    for key, field in fields.items():
        assert re.fullmatch(r"[A-Za-z].+[.]", field.sentence), key
        assert field.unit, key
        assert {r.strip() for r in field.reader.split(",")} <= {
            "sbatch", "srun", "plan", "job", "submit",
        }, key  # fmt: skip


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", "--site"]) == 0
    out = capsys.readouterr().out
    assert "time.lead_seconds\n    Time before the limit" in out
    assert "optimizer.lr" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: {partion: x}", "site.yaml:1: unknown key 'job.partion'; the nearest valid key is "
         "'job.partition'"),
        ("launcher: slurm\ntime:\n  limit_minutes: soon",
         "site.yaml:3: time.limit_minutes is 'soon', expected an integer"),
        ("time: {limit_minutes: 5}", "nearest valid: time.limit_minutes 10"),
        ("time: {lead_seconds: 10}", "time.lead_seconds is 10, too short for a save"),
        ("nodes: {tasks: 0}", "nodes.tasks is 0, must be at least 1"),
        ("launcher: local\njob: {partition: x}", "job.partition is set, but launcher local reads"),
        ("grace_seconds: 3", "launcher slurm leaves the kill to Slurm"),
        ("container: {image: x.sif}", "container.image is set, but container.runtime is none"),
        ("container: {runtime: pyxis}", "container.image is empty"),
        ("container: {runtime: pyxis, image: i, mounts: [data]}", "expected /SRC:/DST"),
        ("job: {partition: 'a b'}", "a character that #SBATCH lines cannot carry"),
        ("job: {options: ['--nodes=3']}", "which `mvl` sets itself"),
        ("job: {options: ['-N 3']}", "expected --name or --name=value"),
        ("environment: {set: {HF_TOKEN: x}}", "would write a secret into the script"),
        ("environment: {export: ['A B']}", "which no shell takes as a variable's name"),
        ("environment: {file: secrets.env}", "must be an absolute path"),
        ("tokens_per_s: {default: 0}", "tokens_per_s.default is 0.0, must be above 0"),
        ("requeue: {crashed: -1}", "requeue.crashed is -1, must be at least 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_would_be_right(site: Path, text: str, message: str) -> None:
    assert message in refuse(site, text)


def test_all_mistakes_come_together(site: Path) -> None:
    said = refuse(site, "job: {partion: x}\ntime: {limit: 5}\nlauncher: pigeon")
    assert len(said.splitlines()) == 3

"""Job scripts: a pure function; what a name or value holds arrives unchanged or is refused."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.site import load_site
from launch.slurm import queue
from launch.slurm.script import Job, header, header_value, render, stage_job
from launch.slurm.shape import Measured, Shape, shape_of
from launch.submission import unwritable
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage, to_yaml
from slurm.loopback.cluster import Cluster
from tests.conftest import LAPTOP

SHAPE = Shape(2, 2, 0, 60, None, None, None)
SIGNS = "'\"$`()\\ \n\t;&|<>*?%#!~{}[]=,:-ü\u202e"
NASTY = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(SIGNS)),
    min_size=1,
    max_size=30,
)
CASES = st.lists(
    st.tuples(NASTY, NASTY, NASTY, NASTY, st.lists(NASTY, max_size=3)), min_size=25, max_size=25
)
# Functions in place of Slurm's commands and of the interpreter, which writes down where it is, what
# it finds in its environment and its arguments.
STANDS_FOR_SLURM = """
srun() {
    while [ "${1#-}" != "$1" ]; do
        case $1 in --output=*) T_LOGS=${1#--output=} ;; esac
        shift
    done
    T_LOGS=$T_LOGS "$@"
}
scontrol() { echo node1; }
squeue() { echo NONE; }
date() { echo 1; }
head() { cat; }
showing() {
    printf '%s\\0' "$#" "$PWD" "$T_VALUE" "${T_LOGS:-}" "$@" >>"$SEEN"
    case ${4-} in job-begin) echo "start 1 1234" ;; job-end) echo "done" ;; esac
}
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1
"""


def job(run: Path, stage: str = "stage0", **changes: object) -> Job:
    return replace(stage_job(run, stage, f"01_{stage}", run / "code" / "x", run), **changes)


def test_a_script_is_a_pure_function_and_reads_well() -> None:
    site = load_site("example-pyxis")
    config = load_stage(
        LAPTOP / "stage1.yaml", ["parallel.data=16", "train.global_batch=16", "evaluation.packs=16"]
    )
    shape = shape_of(config, site)
    made = job(Path("/runs/demo"))
    text = render(made, site, shape)
    assert text == render(made, site, shape)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    head = [line for line in lines if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=240", "--requeue",
        "--signal=B:USR1@600", "--open-mode=append", "--dependency=singleton", "--exclusive",
        "--output=/runs/demo/stages/01_stage0/slurm-%j.out", "--account=my_account", "--mem=0",
        "--export=PATH,HOME,WANDB_API_KEY",
    ):  # fmt: skip
        assert f"#SBATCH {wanted}" in head
    assert "--container-image=/images/megatron_vl.sqsh" in text
    look = 'doctor-node "$logs/doctor" --gpus=8 --least-disk-gb=5 --all-reduce --least-gb-s=0'
    assert look in text
    assert "/runs/demo:/runs/demo" in text
    assert "WANDB_API_KEY" not in "\n".join(line for line in lines if line not in head)


def test_apptainer_wraps_the_ranks_and_the_books() -> None:
    text = render(job(Path("/runs/demo")), load_site("example-apptainer"), SHAPE)
    wrapped = "apptainer exec --bind /scratch:/scratch,/runs/demo:/runs/demo --pwd /runs/demo"
    assert text.count(f"{wrapped} --nv /images/megatron_vl.sif python3 -P -m launch.cli") == 3
    assert "module load apptainer" in text
    assert 'secrets=/home/me/secrets.env\nif [ "$(stat -c %a -- "$secrets")" != 600 ]' in text


@pytest.mark.parametrize(("mode", "code"), [(0o644, 2), (0o600, 0)])
def test_a_secret_reaches_the_ranks_from_a_file_that_only_its_owner_reads(
    mode: int, code: int, tmp_path: Path
) -> None:
    """And from exported variables; the script, which anybody may read, holds neither value."""
    secrets, seen = tmp_path / "it's secret.env", tmp_path / "seen"
    secrets.write_text("T_VALUE='a \"b\" $c'\n")
    secrets.chmod(mode)
    site = load_site("loopback")
    site.doctor.enabled = False
    site.environment.file, site.environment.export = str(secrets), ["PATH", "T_TOKEN"]
    made = job(tmp_path, workdir=tmp_path, python="showing", command=("train",))
    (made.folder / "attempts" / "1").mkdir(parents=True)
    text = render(made, site, SHAPE)
    assert "#SBATCH --export=PATH,T_TOKEN\n" in text
    assert '"b"' not in text
    done = subprocess.run(
        ["bash", "-c", STANDS_FOR_SLURM + text],
        env={"SEEN": str(seen), "PATH": "/usr/bin:/bin", "T_TOKEN": "hidden"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert "must have mode 0600" in done.stderr
        assert not seen.exists()
    else:
        assert [call[1] for call in _calls(seen)] == ['a "b" $c'] * 3


def test_pyxis_reads_the_options_of_a_step_as_they_were_meant(tmp_path: Path) -> None:
    """Each is one that pyxis registers with srun (its spank_option table), values and all."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("image", "mounts", "workdir", "name", "save", "env"):
        parser.add_argument(f"--container-{name}")
    for name in ("mount-home", "remap-root", "entrypoint", "writable", "readonly"):
        parser.add_argument(f"--container-{name}", action="store_true")
        parser.add_argument(f"--no-container-{name}", action="store_true")
    site = load_site("example-pyxis")
    site.container.mounts = ["/data:/data:ro", "/scratch/it's:/scratch"]
    run = tmp_path / "run of 'mine' $x"
    steps = [line for line in render(job(run), site, SHAPE).splitlines() if "--container-" in line]
    assert len(steps) == 3
    for line in steps:
        words = shlex.split(line.removesuffix("\\").replace('"$@"', ""))
        options = [word for word in words if "container-" in word]
        found = parser.parse_args(options)
        assert found.container_image == site.container.image
        own = f"{run}:{run}"
        assert found.container_mounts.split(",") == [*site.container.mounts, own]
        assert found.container_workdir == str(run)
        assert found.no_container_mount_home


@settings(max_examples=20, deadline=None)
@given(cases=CASES)
def test_hostile_names_arrive_unchanged_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple]
) -> None:
    """500 scripts, run by bash with functions in place of Slurm's commands."""
    base = tmp_path_factory.getbasetemp() / "hostile"
    seen = base / "seen"
    site = load_site("loopback")
    site.doctor.enabled = False
    text, expected = STANDS_FOR_SLURM, []
    noted = ["--warned", "", "--asked", "", "--hung", "", "--slurm", "node1"]
    for run, stage, workdir, value, words in cases:
        plain = [name.replace("/", "_").replace("\0", "_").strip(".") for name in (run, workdir)]
        folder, place = (base / (name or "x") for name in plain)
        logs = folder / "stages" / "01" / "attempts" / "1"
        values = [text.replace("\0", "_") for text in (value, *words)]
        made = Job(
            folder, stage, logs.parents[1], folder / "code", place, tuple(values[1:]), "showing"
        )
        site.environment.set = {"T_VALUE": values[0]}
        if any(not name.isprintable() or "\\" in name for name in (str(folder), stage, str(place))):
            with pytest.raises(ConfigError, match="cannot carry"):
                render(made, site, SHAPE)
            continue
        logs.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True)
        script = render(made, site, SHAPE).split("\n")
        body = [line for line in script if not line.startswith("#SBATCH")]
        text += "(\n" + "\n".join(body) + ")\n"
        books = ["-P", "-m", "launch.cli"]
        at = [str(place), values[0]]
        expected += [
            [*at, "", *books, "job-begin", str(folder), stage],
            [*at, f"{logs}/rank_%t.log".replace("%", "%%").replace("%%t", "%t"), *values[1:]],
            [*at, "", *books, "job-end", str(folder), stage, "1", *noted],
        ]
    base.mkdir(exist_ok=True)
    seen.write_text("")
    done = subprocess.run(
        ["bash", "-c", text],
        env={"SEEN": str(seen), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert list(_calls(seen)) == expected


def _calls(seen: Path) -> Iterator[list[str]]:
    """What each call of the interpreter was given."""
    parts = seen.read_bytes().decode("utf-8").split("\0")[:-1]
    while parts:
        count = int(parts[0])
        yield parts[1 : count + 4]
        parts = parts[count + 4 :]


@settings(max_examples=20, deadline=None)
@given(values=st.lists(NASTY, min_size=25, max_size=25, unique=True))
def test_hostile_override_values_reach_the_stage_unchanged(
    tmp_path_factory: pytest.TempPathFactory, values: list[str]
) -> None:
    """500 values: they travel in the resolved configuration, a script holds none of them."""
    allowed = [value for value in values if "${" not in value]
    override = yaml.safe_dump(dict.fromkeys(allowed, 1.0), width=10**6, default_flow_style=True)
    config = load_stage(LAPTOP / "stage0.yaml", [f"data.blend={override}"])
    assert set(config.data.blend) == set(allowed)
    if refused := unwritable(config):
        assert len(refused) == 1
        assert any(sign in "".join(allowed) for sign in "\x85\u2028\u2029")
        return
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_stage(path) == config


def test_slurm_reads_hostile_paths_in_a_header_as_they_are(
    cluster: Cluster, tmp_path: Path
) -> None:
    names = ["two words", "a'b\"c", "50%j", "ünï", "$(touch x)`", "#1;&|{}[]*?~!"]
    site = load_site("loopback")
    site.environment.python = "/bin/true"
    site.doctor.enabled = False
    jobs = {}
    for name in names:
        made = job(tmp_path / name)
        made.folder.mkdir(parents=True)
        script = made.folder / "job.sh"
        script.write_text(render(made, site, SHAPE))
        jobs[queue.submit_script(script, after=None, hold=False)] = made
    waiting = {queue.job_name(made.run, made.stage) for made in jobs.values()}
    assert len(waiting) == len(names)
    for _ in range(300):
        if not any(one.live for one in queue.find_jobs(list(waiting))):
            break
        time.sleep(0.1)
    for number, made in jobs.items():
        assert [path.name for path in made.folder.glob("*.out")] == [f"slurm-{number}.out"]


def test_names_are_of_one_stage_of_one_run() -> None:
    first = queue.job_name(Path("/runs/demo"), "stage0")
    assert first.startswith("stage0.demo.")
    others = [
        queue.job_name(Path("/runs/demo"), "stage1"),
        queue.job_name(Path("/other/demo"), "stage0"),
        queue.job_name(Path("/runs/de mo"), "stage0"),
        queue.job_name(Path("/runs/de_mo"), "stage0"),
    ]
    assert len({first, *others}) == 5


def test_header_values_are_escaped() -> None:
    assert header_value("/a/b-c_1.%j") == "/a/b-c_1.%j"
    assert header_value('a b"c$') == '"a b\\"c$"'


def test_a_comma_cannot_go_into_a_container(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comma or colon"):
        render(job(tmp_path / "a,b"), load_site("example-pyxis"), SHAPE)
    assert "a,b" in render(job(tmp_path / "a,b"), load_site("loopback"), SHAPE)


def test_nothing_is_exported_where_nothing_is_named() -> None:
    site = load_site("loopback")
    site.environment.export = []
    site.requeue.enabled = False
    options = header(job(Path("/runs/demo")), site, SHAPE)
    assert "--export=NIL" in options
    assert "--no-requeue" in options


def test_shapes_follow_ranks_rates_and_measurements() -> None:
    site = load_site("loopback")
    config = load_stage(LAPTOP / "stage1.yaml", ["parallel.data=4", "train.steps=4000"])
    shape = shape_of(config, site)
    assert (shape.nodes, shape.tasks, shape.lead_seconds) == (2, 2, 60)
    work = 4000 * 4 * 512 / (1500 * 4)
    assert shape.work_hours == pytest.approx(work / 3600)
    assert shape.starts == 1
    site.time.limit_minutes = 10
    assert shape_of(config, site).starts == 3  # 1365 s of work in jobs of 600 - 60 - 20
    took = Measured(save_seconds=100, step_seconds=2)
    measured = shape_of(config, site, took)
    assert measured.lead_seconds == 2 * 100 + 2 * 2 + 15
    assert measured.starts == 4
    assert measured.wall_hours == pytest.approx((work + 4 * (20 + 100)) / 3600)
    site.nodes.tasks = 4
    six = load_stage(
        LAPTOP / "stage1.yaml", ["parallel.data=6", "train.global_batch=6", "evaluation.packs=6"]
    )
    with pytest.raises(ConfigError, match=r"6 ranks do not fill .* nearest valid: parallel.data 8"):
        shape_of(six, site)
    site.time.limit_minutes = 3
    with pytest.raises(ConfigError, match="leaves no time to train"):
        shape_of(config, site, took)
    site.tokens_per_s = {}
    assert shape_of(config, site).gpu_hours is None
    assert sys.executable in render(job(Path("/runs/demo")), site, SHAPE)

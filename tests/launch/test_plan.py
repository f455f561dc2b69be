"""`mvl plan` of the published recipe: numbers against the paper's and against built ranks."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import main
from launch.graph import Selection
from launch.plan_contracts import TOKENIZER
from launch.plan_memory import GIB, stage_memory, too_large
from launch.plan_time import stop_problem
from launch.site import load_site
from launch.slurm.shape import Measured
from launch.submission import prepare
from megatron_vl.config.load import load_stage
from megatron_vl.cost.bytes import rank_bytes
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.allocate import build_rank
from tests.conftest import LAPTOP, REPOSITORY, SmallData
from tests.launch.node_recipe import write_node_recipe

FULL = REPOSITORY / "stages/nano_12b_v2_vl"
SITE = "example-pyxis"
PUBLISHED_HOURS = {"stage0": 6, "stage1": 30, "stage2": 15, "stage3": 3.5, "stage4": 5.5}
"""Table 2 of arXiv 2511.03929, on 32 nodes of 8 in stage 0 and 64 in the others."""
NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron", "numpy"):
            raise ImportError(f"{name} is not on a login node")
sys.meta_path.insert(0, Refuse())
from launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    main(["plan", str(FULL), "--site", SITE, "--json", *words])
    return json.loads(capsys.readouterr().out)


def test_a_login_node_without_torch_plans_the_published_recipe() -> None:
    words = [sys.executable, "-c", NO_TORCH, "plan", "stages/nano_12b_v2_vl", "--site", SITE]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == exit_codes.OK, said.stderr
    for text in (
        "stage1: 112,500,000,000 tokens / (128 sequences x 16,384 tokens) = 53,644 steps",
        "memory of the fullest rank, GiB",
        "optimizer shard",
        "put together by init",
        "49,152 -> 311,296",
        "wall time against saves",
        "not read: stage0: data.packer, as data.packing was set later",
        "train.threads",
    ):
        assert text in said.stdout


def test_hours_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The site states the published rates, so steps x tokens must give the published hours."""
    jobs = {job["stage"]: job["shape"] for job in planned(capsys)["jobs"]}
    for stage, hours in PUBLISHED_HOURS.items():
        shape = jobs[stage]
        assert shape["work_hours"] == pytest.approx(hours, rel=0.01)
        assert shape["nodes"] * shape["gpus"] == (256 if stage == "stage0" else 512)
        # A start every four hours less starting and warning: nine of them for thirty hours.
        assert shape["starts"] == -(-shape["work_hours"] * 3600 // (240 * 60 - 600 - 300))


def test_memory_is_that_of_built_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for row in planned(capsys)["memory"]:
        held = rank_bytes(load_stage(FULL / f"{row['stage']}.yaml"), 0)
        assert row["weights"] == held.weights
        assert row["optimizer"] == held.optimizer
        parts = ("weights", "gradients", "optimizer", "fp8_copies", "teacher", "encoder",
                 "projector", "decoder", "mamba_states")  # fmt: skip
        rest = max(row["logits"], row["work"])
        assert row["total"] == sum(row[part] for part in parts) + rest
        assert row["total"] < 80 * GIB


@pytest.mark.parametrize(
    ("stage", "overrides", "rank"),
    [
        ("stage0", [], 5),
        ("stage1", [], 511),
        ("stage1", ["parallel.pipeline=4", "parallel.first_stage_layers=14",
                    "parallel.data=16"], 300),
        ("stage2", ["precision=fp32", "parallel.data=3", "train.global_batch=129",
                    "evaluation.packs=3"], 17),
        ("stage4", [], 17),
    ],
)  # fmt: skip
def test_a_rank_of_the_full_layout_is_built_to_the_byte(
    stage: str, overrides: list[str], rank: int
) -> None:
    """megatron-core's own buffers and optimizer, on the meta device."""
    config = load_stage(FULL / f"{stage}.yaml", overrides)
    built = build_rank(config, rank)
    expected = rank_bytes(config, built.place["pipeline"], built.place["shard"])
    assert replace(expected, fp8_copies=0) == built.bytes
    assert built.place["tensor"] == rank % 8


def test_build_rank_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(LAPTOP / "stage1.yaml"), "--build-rank", "1"]
    assert main([*words, "parallel.pipeline=2", "parallel.data=1"]) == exit_codes.OK
    said = capsys.readouterr().out
    assert "rank 1 of 2 (tensor 0, pipeline 1, context 0, data 0)" in said
    assert "-MM-" in said
    assert "the same as computed from the config alone" in said
    assert main([*words[:-1], "2"]) == exit_codes.USAGE
    assert "nearest valid: 1" in capsys.readouterr().err


def test_what_does_not_fit_names_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_stage(FULL / "stage2.yaml")
    room = 30 * GIB
    problem = too_large(config, room)
    assert problem is not None
    (way,) = problem.partition("nearest valid: ")[2].split(", or ")
    key, _, layers = way.partition(" ")
    assert key == "recompute.decoder"

    def most(count: int) -> int:
        stage = load_stage(FULL / "stage2.yaml", [f"recompute.decoder={count}"])
        return max(row.total for row in stage_memory(stage))

    assert most(int(layers)) <= room < most(int(layers) - 1)
    assert too_large(config, 80 * GIB) is None
    site = tmp_path / "small.yaml"
    text = (REPOSITORY / f"slurm/sites/{SITE}.yaml").read_text()
    site.write_text(text.replace("gpu_gib: 80", "gpu_gib: 30"))
    words = ["plan", str(FULL / "stage2.yaml"), "--site", str(site)]
    assert main(words) == exit_codes.FOUND
    assert f"problem: {problem}" in capsys.readouterr().out


def test_a_warning_that_comes_too_late() -> None:
    site, config = load_site(SITE), load_stage(FULL / "stage4.yaml")
    assert stop_problem(config, site, None) is None
    site.time.save_seconds = 300
    problem = stop_problem(config, site, None)
    assert problem is not None
    seconds = int(problem.rpartition("time.lead_seconds ")[2])
    assert seconds % 60 == 0
    site.time.lead_seconds = seconds
    assert stop_problem(config, site, None) is None
    # What a run has measured is held against the lead that follows from it.
    assert stop_problem(config, site, Measured(save_seconds=400.0, step_seconds=60.0)) is None


def recipe_with_roots(folder: Path, tokenizers: dict[str, dict]) -> Path:
    """Two laptop stages, each with a data root and tokenizer of its own."""
    folder.mkdir()
    (folder / "base.yaml").write_text((LAPTOP / "base.yaml").read_text())
    for number, (name, content) in enumerate(tokenizers.items()):
        text = (LAPTOP / "stage1.yaml").read_text().replace("blends/", f"{LAPTOP}/blends/")
        text = text.replace("name: stage1", f"name: stage{number}")
        if number == 0:
            text = text.replace("weights: previous", "weights: random")
        root = folder / name
        text = text.replace("data:\n", f"data:\n  root: {root}\n")
        (folder / f"stage{number}.yaml").write_text(text)
        (root / TOKENIZER).parent.mkdir(parents=True)
        (root / TOKENIZER).write_text(json.dumps(content))
    return folder


def test_stages_must_share_a_tokenizer_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2047}]}
    same = recipe_with_roots(tmp_path / "same", {"left": one, "right": one})
    assert main(["plan", str(same)]) == exit_codes.OK
    assert "problem" not in capsys.readouterr().out
    other = {"model": {"vocab": {"a": 1, "b": 0}}, "added_tokens": [{"id": 2048}]}
    differ = recipe_with_roots(tmp_path / "differ", {"left": one, "right": other})
    assert main(["plan", str(differ)]) == exit_codes.FOUND
    said = capsys.readouterr().out
    assert "gives ids up to 2048, model.vocab_size is 2048; nearest valid: 2049" in said
    assert "is not that of stage0" in said


def test_nemo_run_gets_one_file_that_compiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'a "quoted" run'
    words = ["plan", str(FULL), "--site", SITE, "--run", str(run), "--format", "nemo-run"]
    assert main(words) == exit_codes.OK
    text = capsys.readouterr().out
    code = compile(text, "chain.py", "exec")
    names = {name: value for name, value in _constants(text).items() if name.isupper()}
    assert "main" in code.co_names
    assert names["JOBS"]["stage1"]["after"] == ["stage0"]
    assert names["JOBS"]["release"]["after"] == ["stage4", "qad_nvfp4"]
    assert names["JOBS"]["stage1"]["shape"] == {
        "nodes": 64, "ntasks_per_node": 8, "gpus_per_node": 8,
    }  # fmt: skip
    assert names["JOBS"]["stage0"]["variables"]["MVL_RUN"] == str(run)
    assert f"{run}:{run}" in names["MOUNTS"]
    assert names["EXECUTOR"]["time"] == "04:00:00"
    checked = subprocess.run(["bash", "-n"], input=names["RANK"], text=True, check=False)
    assert checked.returncode == 0
    assert main([*words[:3], "example-apptainer", "--format", "nemo-run"]) == exit_codes.USAGE
    assert "container.runtime is apptainer" in capsys.readouterr().err


def _constants(text: str) -> dict:
    """The literals that a module assigns."""
    found = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = ast.literal_eval(line.value)
            except ValueError:
                continue
    return found


def test_video_keys_without_a_video_are_told(
    small_data: SmallData, capsys: pytest.CaptureFixture[str]
) -> None:
    """Set by the stage itself: stage 2 of the laptop shows clips, and with this blend none."""
    words = ["plan", str(LAPTOP / "stage2.yaml"), small_data.override]
    main(words)
    assert "data.video" not in capsys.readouterr().out
    main([*words, "data.blend={ocr: 1, text: 1}"])
    said = capsys.readouterr().out
    assert "not read: stage2: data.video.fps (" in said
    assert "as no source shows video in its first files" in said


def test_diff_lists_what_a_submission_would_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_node_recipe(tmp_path / "recipe"), RunFolder(tmp_path / "run")
    prepare(recipe, run, Selection(), "local", ["train.seed=5"])
    words = ["plan", str(recipe), "--diff", str(run.path)]
    assert main([*words, "train.seed=5"]) == exit_codes.OK
    assert capsys.readouterr().out == "nothing would change\n"
    assert main([*words, "train.seed=9"]) == exit_codes.OK
    assert "config: train.seed: 5 -> 9" in capsys.readouterr().out


def test_nodes_and_gates_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = {node["name"]: node for node in planned(capsys)["nodes"]}
    assert nodes["init"]["does"].endswith("together as stage0")
    assert nodes["release"]["after"] == ["stage4", "qad_nvfp4"]
    assert "ruler.accuracy at least 70.0" in nodes["text_stage4"]["gate"]
    assert nodes["text_stage4"]["gate"].endswith("otherwise hold")

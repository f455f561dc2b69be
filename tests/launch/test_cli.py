"""The command line: light, clean, and with the exit codes it documents."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import build_parser, main
from launch.graph import Selection
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder
from tests.conftest import DRAWN
from tests.launch.small_recipe import LAPTOP, write_recipe
from tests.launch.test_chain import supervise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "one")
    prepare(write_recipe(tmp_path / "recipe"), folder, Selection(), "local")
    return folder


def test_a_login_node_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "import launch.cli, launch.status, launch.plan, launch.chain, launch.report, launch.logs\n"
        "import launch.config_commands, megatron_vl.run.folder, megatron_vl.config.explain\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_status_imports_nothing_slow(run: RunFolder) -> None:
    """What makes it answer at once (0.1 s on two cores) is what it leaves out."""
    program = (
        "import sys\n"
        "from launch.cli import main\n"
        f"main(['status', {str(run.path)!r}, '--json'])\n"
        "slow = {'torch', 'megatron', 'numpy', 'matplotlib', 'jinja2', 'PIL'}\n"
        "assert slow.isdisjoint(sys.modules), slow & set(sys.modules)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert [stage["status"] for stage in json.loads(found.stdout)["stages"]] == ["waiting"] * 2


def test_every_command_has_help_with_an_example_that_parses() -> None:
    parsers = [build_parser()]
    leaves = []
    while parsers:
        parser = parsers.pop()
        inside = [
            a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict)
        ]
        if inside:
            parsers += inside[0].choices.values()
        else:
            leaves.append(parser)
    assert len(leaves) >= 14
    for parser in leaves:
        examples = parser.format_help().split("example:\n  mvl ")[1].strip().split("\n  mvl ")
        for example in examples:
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", example)]
            assert build_parser().parse_args(words).handler, parser.prog


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    table = (ROOT / "docs" / "exit_codes.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE))
    assert {int(code): text for code, text in rows.items()} == exit_codes.MEANINGS


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "no/such/recipe"], 2, "no such recipe folder"),
        (["plan", str(LAPTOP)[:-1]], 2, f"nearest valid: {LAPTOP}"),
        (["plan", str(LAPTOP), "train.stepz=1"], 2, "nearest valid key is 'train.steps'"),
        (["plan", str(LAPTOP), "--from", "stage9"], 2, "no such stage"),
        (["status", "/no/such/run"], 2, "no such folder"),
        (["config", "explain", str(DRAWN), "lr"], 2, "nearest valid key"),
        (["report", "/no/such/run"], 2, "no such folder"),
    ],
)
def test_errors_are_one_clean_message(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(f"mvl {words[0]}: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["statsu"], "no command 'statsu'; nearest valid: status (there are plan, submit,"),
        (["config", "shwo", str(DRAWN)], "no command 'shwo'; nearest valid: show"),
        (
            ["plan", str(LAPTOP), "--stie", "x"],
            "unrecognized arguments: --stie x; nearest valid: --site",
        ),
        (["logs", "runs/a", "stage0", "--folow"], "nearest valid: --follow"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == exit_codes.USAGE
    said = capsys.readouterr().err
    assert message in said
    assert "job-begin" not in said, "commands for mvl itself are not offered"


def test_a_run_that_is_not_there_is_answered_with_those_near_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", f"{run.path}x"]) == exit_codes.USAGE
    assert f"no such folder; runs near it are {run.path}" in capsys.readouterr().err


def test_a_gate_s_override_can_be_planned_where_some_stages_have_no_gate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", str(LAPTOP), "gate.otherwise=continue"]) == exit_codes.OK
    assert "otherwise continue" in capsys.readouterr().out


def test_problems_of_all_stages_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LAPTOP), "train.global_batch=6", "parallel.data=4"]) == 2
    errors = capsys.readouterr().err
    assert all(f"stage{index}.yaml" in errors for index in range(5))


def test_plan_counts_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LAPTOP), "--until", "stage1", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["stages"]
    assert (first["stage"], first["trainable"]) == ("stage0", ["projector"])
    assert first["tokens"] == first["sequences"] * 512
    assert first["starts_from"] == "init, fresh projector"
    assert (second["carries"], second["starts_from"]) == ("previous weights", "stage0")
    assert second["parameters"] == second["trainable_parameters"] == first["parameters"]
    assert first["trainable_parameters"] < first["parameters"] / 4
    assert main(["plan", str(LAPTOP)]) == 0
    text = capsys.readouterr().out
    assert "stage4" in text
    assert "every rule between keys holds" in text


def test_config_commands(capsys: pytest.CaptureFixture[str]) -> None:
    stage = str(LAPTOP / "stage0.yaml")
    assert main(["config", "show", stage, "optimizer.lr=1e-4"]) == 0
    assert "lr: 0.0001" in capsys.readouterr().out
    assert main(["config", "show", stage, "--origins"]) == 0
    assert re.search(r"name = stage0 +# .*stage0\.yaml:\d+", capsys.readouterr().out)
    assert main(["config", "diff", stage, str(LAPTOP / "stage1.yaml")]) == 0
    assert "train.trainable: [projector] -> " in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert "optimizer.clip_grad" in capsys.readouterr().out


def test_status_and_logs_of_a_failed_run(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    supervise(run, stage0="import sys; print('boom'); sys.exit(1)")
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"init\s+done\s+1\s+2/2\s+2\.5000\s+1\.2500", text)
    assert "rank 0 exited with status 1" in text
    assert main(["status", str(run.path.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "failed"
    assert main(["status", str(run.path.parent)]) == 0
    assert "1/2" in capsys.readouterr().out
    assert main(["logs", str(run.path), "stage0"]) == 0
    assert capsys.readouterr().out == "boom\n"
    assert main(["logs", str(run.path), "stage0", "--attempt", "4"]) == 2
    assert "has the attempts 1" in capsys.readouterr().err


def test_an_attempt_whose_supervisor_vanished_is_lost(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.stage("init").start_attempt()
    assert main(["status", str(run.path)]) == 0
    assert "lost" in capsys.readouterr().out


def test_train_refuses_what_the_run_was_not_planned_with(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(DRAWN), "--run", str(run.path)]) == 2
    assert "not the configuration this run was planned with" in capsys.readouterr().err


def test_a_submit_that_is_refused_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    data = f"data.root={tmp_path}"
    for run, overrides, message in [
        ("new", ["data.root=/no/such"], "mvl data prepare"),
        ("new", [data], "data.blend names"),
        ("new", ["train.stepz=1"], "nearest valid key"),
        ("file", [data], "is a file; name a folder"),
        ("full", [data], "holds other files (such as mine) and no run"),
    ]:
        assert main(["submit", str(LAPTOP), "--run", str(tmp_path / run), *overrides]) == 2
        assert message in capsys.readouterr().err
    assert main(["submit", str(LAPTOP), "--run", ""]) == 2
    assert "--run is empty" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_may_not_be_touched_is_no_defect(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("megatron_vl.run.atomic.write_text", refuse)
    assert main(["report", str(run.path)]) == 2
    assert capsys.readouterr().err == (
        f"mvl report: {run.path / 'report.html'}: Permission denied\n"
    )


def test_a_run_done_as_far_as_it_was_asked_is_partial(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path / "recipe", run, Selection(last="init"), "local", ["train.seed=5"])
    supervise(run)
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert f"{run.path}: partial" in text
    assert f"to go on: mvl submit {tmp_path / 'recipe'} --run {run.path} train.seed=5" in text


def test_plan_says_what_data_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LAPTOP), f"data.root={tmp_path / 'nowhere'}"]) == 0
    text = capsys.readouterr().out
    assert "before a submit: data.root is" in text
    assert "mvl data prepare" in text


def test_help_lists_no_hidden_command_and_comes_without_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "mvl submit stages/laptop --run runs/demo --follow" in text
    assert "supervise" not in text


def test_a_broken_pipe_is_no_success_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what prints may lose its reader; a rank's own pipes are part of its work."""

    def breaks(args: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("launch.train.main", breaks)
    with pytest.raises(BrokenPipeError):
        main(["train", "stage.yaml", "--run", "runs/demo"])

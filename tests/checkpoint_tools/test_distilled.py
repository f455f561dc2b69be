"""What is made of a distillation's student: opened, released and certified as what it was trained
to be, and compared with its teacher."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from checkpoint_tools.certificate.check import Bounds, Check, Findings
from checkpoint_tools.certificate.divergence import check_divergence
from checkpoint_tools.certificate.subject import Subject, open_subject
from checkpoint_tools.certificate.teacher import check_student
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.open_export import open_export
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.release import ReleaseOptions, release
from checkpoint_tools.stage_source import open_stage
from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.engine.fp8_linear import Fp8Capable
from megatron_vl.infer.model import find_checkpoint, open_model
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.calibrate import pack_logits, planned_packs
from tests.checkpoint_tools.conftest import quiet
from tests.conftest import DRAWN, LAPTOP, TINY, SmallData
from tests.support.ranks import RankPool
from tests.train import distill_jobs
from tests.train.stage_jobs import run_stage

pytestmark = pytest.mark.distributed

FORMATS = ("fp8", "nvfp4")


@pytest.fixture(scope="module")
def run(
    ranks: RankPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """Two steps from drawn weights, then two of each student."""
    made = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    entries = [{"name": "init", "folder": "00_init", "after": []}]
    for form in FORMATS:
        entries.append({"name": f"qad_{form}", "folder": f"qad_{form}", "after": ["init"]})
    made.create({"stages": entries})
    common = [small_data.override, *TINY, "train.steps=2", "evaluation.packs=0"]
    common += ["evaluation.every=0", "evaluation.batches=1"]
    qad = LAPTOP / "qad_nvfp4.yaml"
    for name, file, own in (
        ("init", DRAWN, []),
        *(
            (f"qad_{form}", qad, [f"distill.student={form}", "optimizer.lr=1e-2"])
            for form in FORMATS
        ),
    ):
        config = load_stage(file, [*common, *own])
        config.name = name
        made.stage(name).config_path.write_text(to_yaml(config))
        ranks.run(1, run_stage, made.path, name)
    return made


@pytest.fixture(scope="module")
def releases(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each student in its format."""
    base = tmp_path_factory.mktemp("students")
    for form in FORMATS:
        export(run.stage(f"qad_{form}").path, base / form, ExportOptions(form), quiet)
    return {form: base / form for form in FORMATS}


def subject(run: RunFolder, form: str, folder: Path) -> Subject:
    return open_subject(PublishedFolder(folder), open_stage(run.stage(f"qad_{form}").path))


def test_a_release_holds_the_numbers_the_student_trained_with(
    ranks: RankPool, run: RunFolder, releases: dict[str, Path]
) -> None:
    """Its receipt's loss is that of the exported bytes, by the calibration it trained under, which
    an export takes unasked."""
    stage = run.stage("qad_nvfp4")
    (loss,) = ranks.run(1, distill_jobs.released_loss, stage.path, releases["nvfp4"])
    receipt = stage.receipt()
    assert receipt is not None
    assert receipt.metrics["eval/val"] == pytest.approx(loss, rel=1e-6)
    assert receipt.metrics["eval/val_divergence"] > 0


@pytest.mark.parametrize("form", FORMATS)
def test_a_student_opens_as_what_its_release_is(
    run: RunFolder, releases: dict[str, Path], form: str
) -> None:
    """And not as the weights behind it."""
    stage = run.stage(f"qad_{form}").path
    (pack,) = planned_packs(load_stage(stage / "config.yaml"), "val", 1)
    with open_model(stage) as student, torch.no_grad():
        for parameter in student.module.parameters():  # a release holds what is not quantized so
            parameter.copy_(parameter.bfloat16())
        opened = pack_logits(student.module, pack)
        for module in student.module.modules():
            if isinstance(module, Fp8Capable):
                module.operands = None
        plain = pack_logits(student.module, pack)
    assert f"computing in {form} as it was trained" in student.origin
    with open_export(releases[form]) as model:
        released = pack_logits(model.module, pack)
    rows = student.config.model.vocab_size
    assert torch.equal(opened[:, :rows], released[:, :rows])
    assert not torch.allclose(plain[:, :rows], released[:, :rows], atol=1e-2)


def test_a_run_stands_for_its_last_stage_that_is_no_student(run: RunFolder, tmp_path: Path) -> None:
    """But for the format of a student; and what is neither is refused."""
    found = {form: find_checkpoint(run.path, StudentFormat(form))[1] for form in ("none", *FORMATS)}
    names = {form: path.parent.name for form, path in found.items()}
    assert names == {"none": "00_init", "fp8": "qad_fp8", "nvfp4": "qad_nvfp4"}
    other = {"bf16": run.stage("qad_nvfp4").path}
    with pytest.raises(ConversionError, match="distilled to compute in nvfp4, its bf16 is no"):
        release(tmp_path / "out", other, ReleaseOptions(), quiet)


@pytest.fixture(scope="module")
def measured(run: RunFolder, releases: dict[str, Path]) -> Findings:
    """What the certificate of the NVFP4 student says of its answers."""
    findings = Findings(quiet)
    about = subject(run, "nvfp4", releases["nvfp4"])
    check_student(about, findings)
    check_divergence(about, Bounds(), findings, quiet)
    return findings


def checks(findings: Findings) -> dict[str, Check]:
    return {check.name: check for check in findings.checks}


def test_a_student_is_compared_with_its_teacher(
    run: RunFolder, releases: dict[str, Path], measured: Findings
) -> None:
    """By another way to the same numbers: both models opened as their users open them."""
    packs = list(planned_packs(load_stage(run.stage("qad_nvfp4").config_path), "val", 8))
    places = [pack.loss_weights_L.nonzero().flatten() for pack in packs]
    with open_model(run.stage("init").path) as teacher, torch.no_grad():
        for parameter in teacher.module.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = [pack_logits(teacher.module, *one) for one in zip(packs, places, strict=True)]
    with open_export(releases["nvfp4"]) as student:
        found = [pack_logits(student.module, *one) for one in zip(packs, places, strict=True)]
    rows = student.config.model.vocab_size
    p, q = (torch.cat(each)[:, :rows].log_softmax(-1) for each in (expected, found))
    divergence = float(F.kl_div(q, p, reduction="batchmean", log_target=True))
    assert checks(measured)["kl"].measured == pytest.approx(divergence, rel=1e-3)
    same = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert checks(measured)["top1"].measured == pytest.approx(same, abs=2 / len(p))
    receipt = run.stage("init").receipt()
    assert receipt is not None
    assert receipt.checkpoint is not None
    told = measured.figures["divergence"]["from"]
    assert told == f"the teacher, init in bfloat16, checkpoint {receipt.checkpoint.digest}"
    assert checks(measured)["teacher"].passed
    own = measured.figures["divergence_from_own_weights"]["kl"]
    assert abs(own - divergence) > 0.01 * divergence


def test_a_student_without_its_teacher_is_not_certified(
    run: RunFolder, releases: dict[str, Path], tmp_path: Path
) -> None:
    """Away from its run, and in one whose teacher has changed."""
    alone = shutil.copytree(run.stage("qad_nvfp4").path, tmp_path / "alone")
    other = RunFolder(shutil.copytree(run.path, tmp_path / "other"))
    checkpoint = find_checkpoint(other.stage("init").path)[0]
    shard = max(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    for stage, said in ((alone, "which no receipt in"), (other.stage("qad_nvfp4").path, "changed")):
        findings = Findings(quiet)
        about = open_subject(PublishedFolder(releases["nvfp4"]), open_stage(stage))
        check_divergence(about, Bounds(), findings, quiet)
        assert not findings.passed
        assert said in checks(findings)["teacher"].says
        assert set(findings.not_run) == {"kl, top1"}


def test_a_student_in_another_format_is_not_certified(
    run: RunFolder, releases: dict[str, Path], measured: Findings
) -> None:
    findings = Findings(quiet)
    check_student(subject(run, "fp8", releases["nvfp4"]), findings)
    assert "was distilled to compute in fp8; release it so" in checks(findings)["student"].says
    assert checks(measured)["student"].passed

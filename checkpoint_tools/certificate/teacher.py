"""The checkpoint that a distilled one learned from: what its answers are held to.

A distillation leaves weights that are meant to be quantized; in bfloat16 they are no model anybody
asked for. So the release of a student is compared with the BF16 release of its teacher. Which that
was, the student's own state file says by a digest; the stage that made it lies in the same run.

Refuses: a run that holds no such checkpoint (any longer), or one whose files have changed. Costs a
read of the teacher's files.
"""

from checkpoint_tools.certificate.check import Findings
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.stage_source import StageSource, open_stage
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder


def distilled(source: StageSource) -> bool:
    """Whether a checkpoint is a distillation's student."""
    return source.config.distill.student is not StudentFormat.none


def check_student(subject: Subject, findings: Findings) -> None:
    """A student is released in the format it was distilled for; of other checkpoints, nothing."""
    source = subject.source
    if distilled(source):
        made_for = source.config.distill.student.value
        says = (
            f"{source.state.stage} was distilled to compute in {made_for}; release it so, and "
            f"{subject.format} from the stage it was distilled from"
        )
        same = subject.format == made_for
        findings.add("student", same, made_for, subject.format, "" if same else says)


def teacher_of(source: StageSource) -> StageSource:
    """The teacher of a distilled checkpoint, its digest compared with its files.

    Raises:
        ConversionError: it is not there, or not what it was.
    """
    digest, run = source.state.parent, RunFolder(source.stage.path.parent.parent)
    for stage in run.stages() if run.exists() else []:
        receipt = stage.receipt()
        if receipt is None or receipt.checkpoint is None or receipt.checkpoint.digest != digest:
            continue
        teacher = open_stage(stage.checkpoint_path(receipt))
        if checkpoint_digest(teacher.checkpoint.folder) != digest:
            raise ConversionError(
                f"{teacher.checkpoint.folder}, which {source.checkpoint.folder} was distilled "
                "from, has changed since; restore it, or distil again"
            )
        return teacher
    raise ConversionError(
        f"{source.checkpoint.folder} was distilled from a checkpoint with digest {digest[:12]}, "
        f"which no receipt in {run.path} names; certify it inside the run that trained it, with "
        "the stage it was distilled from in place"
    )

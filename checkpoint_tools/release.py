"""`mvl checkpoint release`: calibrate, export and certify; nothing takes its place uncertified.

    OUT/bf16, OUT/fp8, OUT/nvfp4          releases with a passing certificate
    OUT/FORMAT.failed                     one whose certificate failed, for looking at
    OUT/amax/DIGEST.safetensors           calibrated inputs of a checkpoint

A release is exported to `FORMAT.uncertified`, certified there by a fresh process, and renamed. What
is already certified for the same checkpoint, format, layout and bounds stays, so the command can be
given again after any end; an export goes on where it was killed.

Refuses an OUT that holds the release of another checkpoint. Costs a calibration for each checkpoint
that is quantized, and an export and a certificate for each format.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_tools.calibrate import PACKS, calibrate_stage
from checkpoint_tools.certificate.check import CERTIFICATE_FILE, Bounds
from checkpoint_tools.certificate.run import certify, failures
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.export_hf import SHARD_BYTES, ExportOptions, export
from checkpoint_tools.published_folder import read_json
from checkpoint_tools.quantized_layout import MODELOPT, QUANTIZED, Calibration
from checkpoint_tools.stage_source import StageSource, open_stage
from checkpoint_tools.streaming import Progress
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.infer.model import find_checkpoint

RELEASED = ("bf16", *QUANTIZED)
_FAILED, _UNCERTIFIED = ".failed", ".uncertified"


@dataclass(frozen=True)
class ReleaseOptions:
    """How releases are made.

    Attributes:
        layout: of the quantized formats, a name of `LAYOUTS`.
        packs: that calibration looks at.
        shard_bytes: most bytes of one shard.
        tokenizer: as export's option.
    """

    layout: str = MODELOPT
    bounds: Bounds = field(default_factory=Bounds)
    packs: int = PACKS
    shard_bytes: int = SHARD_BYTES
    tokenizer: Path | None = None


def release(
    out: Path,
    checkpoints: Mapping[str, Path],
    options: ReleaseOptions,
    report: Callable[[str], None],
) -> dict[str, list[str]]:
    """Make a certified release of each format.

    Args:
        checkpoints: a run, a stage folder or a checkpoint by format.
        report: is told a line at a time.

    Returns:
        What failed by format; nothing for one that is in place.

    Raises:
        ConversionError: OUT holds a release of another checkpoint, or a checkpoint is not what its
            receipt says.
    """
    sources = {n: _source(n, checkpoints[n]) for n in RELEASED if n in checkpoints}
    if not sources:
        raise ConversionError(f"nothing to release: name a checkpoint for {' or '.join(RELEASED)}")
    waiting = {
        name: source
        for name, source in sources.items()
        if not _in_place(out / name, name, source, options, report)
    }
    failed: dict[str, list[str]] = {name: [] for name in sources}
    for source in {source.digest: source for source in waiting.values()}.values():
        source.check_digest()
    for name, source in waiting.items():
        failed[name] = _make(out, name, source, options, report)
    return failed


def _source(name: str, path: Path) -> StageSource:
    """The checkpoint that a format is made of: of a run a student of the format, where it has one.

    Raises:
        ConversionError: a student of another format is named; its weights are made for that.
    """
    own = next((one for one in StudentFormat if one.value == name), StudentFormat.none)
    source = open_stage(find_checkpoint(path, own)[0])
    student = source.config.distill.student
    if student not in (StudentFormat.none, own):
        raise ConversionError(
            f"{path} was distilled to compute in {student.value}, its {name} is no model anybody "
            f"trained; release it as {student.value}, and {name} from the stage it was distilled "
            "from"
        )
    return source


def _in_place(
    folder: Path,
    name: str,
    source: StageSource,
    options: ReleaseOptions,
    report: Callable[[str], None],
) -> bool:
    """Whether a release is certified already. Raises ConversionError where it is another."""
    if not folder.exists():
        return False
    made = read_json(folder / CERTIFICATE_FILE)
    layout = options.layout if name in QUANTIZED else None
    asked = {
        "checkpoint": source.digest,
        "format": name,
        "layout": layout,
        "bounds": options.bounds.changed(),
        "passed": True,
    }
    found = {
        "checkpoint": made.get("checkpoint", {}).get("digest"),
        "bounds": made.get("changed_bounds"),
        **{key: made.get(key) for key in ("format", "layout", "passed")},
    }
    differing = [key for key in asked if found[key] != asked[key]]
    if differing:
        listed = "".join(f"\n  {key} {found[key]}, not {asked[key]}" for key in differing)
        raise ConversionError(
            f"{folder} is another release; name another folder or remove it first. It has{listed}"
        )
    report(f"{name}: certified already for checkpoint {source.digest[:12]}")
    return True


def _make(
    out: Path,
    name: str,
    source: StageSource,
    options: ReleaseOptions,
    report: Callable[[str], None],
) -> list[str]:
    """One release; what failed."""
    checkpoint = source.checkpoint.folder
    amax = _amax(out, source, options, report) if name in QUANTIZED else None
    uncertified = out / (name + _UNCERTIFIED)
    shutil.rmtree(uncertified, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    last: dict[str, Progress] = {}

    def exported(progress: Progress) -> None:
        last["progress"] = progress
        report(f"{name}: {progress}")

    export(
        checkpoint,
        uncertified,
        ExportOptions(
            format=name,
            shard_bytes=options.shard_bytes,
            check_digest=False,  # done once for all formats
            tokenizer=options.tokenizer,
            layout=options.layout,
            amax=amax,
        ),
        exported,
    )
    made = certify(
        uncertified,
        checkpoint,
        lambda line: report(f"{name}: {line}"),
        options.bounds,
        options.tokenizer,
        _figures(last["progress"], source, amax),
    )
    wrong = failures(made)
    place = out / (name + _FAILED if wrong else name)
    shutil.rmtree(out / (name + _FAILED), ignore_errors=True)
    os.rename(uncertified, place)
    report(f"{name}: {'FAILED, left in ' if wrong else 'certified: '}{place}")
    return wrong


def _figures(progress: Progress, source: StageSource, amax: Path | None) -> dict[str, Any]:
    """What is known before the certificate's own measurements."""
    figures: dict[str, Any] = {
        "export_gb_per_s": round(progress.done / 1e9 / max(progress.seconds, 1e-9), 3),
        "parameters": model_parameters(source.config.model).total,
    }
    if amax is not None:
        made = vars(Calibration.read(amax))
        figures["calibration"] = {key: made[key] for key in ("packs", "tokens", "seed")}
    return figures


def _amax(
    out: Path, source: StageSource, options: ReleaseOptions, report: Callable[[str], None]
) -> Path:
    """The calibrated inputs of a checkpoint: those it was trained under, or else measured once."""
    if source.trained_amax is not None:
        return source.trained_amax
    path = out / "amax" / f"{source.digest[:16]}-{options.packs}.safetensors"
    if not path.is_file():
        calibrate_stage(source, path, lambda progress: report(str(progress)), options.packs)
    return path

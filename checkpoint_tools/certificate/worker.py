"""The process that looks at a release: started anew, without a network, for each certificate.

Checks go from the harmless to the trusting: bytes first, then names and numbers, then the shipped
code (only once it is known to be this program's own), then models. What needs a check that failed
is not run, and says so.

Run as `python -m checkpoint_tools.certificate.worker REQUEST RESULT`; lines on stdout are progress.
"""

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers.utils.logging

from checkpoint_tools import release_files
from checkpoint_tools.certificate import files, tensors
from checkpoint_tools.certificate.check import Bounds, Findings, StoppedError
from checkpoint_tools.certificate.network import NetworkGuard
from checkpoint_tools.certificate.subject import Subject, open_subject
from checkpoint_tools.certificate.teacher import check_student
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.names import NamesError
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.stage_source import StageSource, open_stage

_BROKEN = (ConversionError, NamesError, OSError, KeyError, TypeError, ValueError)
_ANY = (Exception,)
"""What broken weights and settings make of a model cannot be listed."""


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        folder: the release.
        against: a run, a stage folder or a checkpoint.
        tokenizer: as export's option; empty for the one beside the checkpoint or its data.
    """

    folder: str
    against: str
    tokenizer: str
    bounds: Bounds


def run_checks(request: Request, source: StageSource, findings: Findings) -> Subject | None:
    """All checks of a release, in order."""
    try:
        subject = check_files(request, source, findings)
    except StoppedError as stopped:
        findings.not_run["everything else"] = f"{stopped} failed: the folder cannot be read further"
        return None
    needed = {"names", "dtypes_and_shapes", "code", "auto_map", "no_pickle"}
    failed = sorted(c.name for c in findings.checks if c.name in needed and not c.passed)
    if failed:
        findings.not_run["prompts, models"] = f"{', '.join(failed)} failed: nothing there is run"
        return subject
    try:
        _check_behaviour(request, subject, findings)
    except StoppedError as stopped:
        findings.not_run["what follows"] = f"{stopped} failed"
    return subject


def check_files(request: Request, source: StageSource, findings: Findings) -> Subject:
    """What needs neither the shipped code nor a model.

    Raises:
        StoppedError: the folder cannot be read any further; what was found is noted.
    """
    folder = Path(request.folder)
    tokenizer = Path(request.tokenizer) if request.tokenizer else None
    if not files.check_no_pickles(folder, findings):
        raise StoppedError("no_pickle")
    whole = "index, shards and headers agree"
    published = findings.attempt("index", whole, lambda: PublishedFolder(folder), _BROKEN)
    findings.add("index", True, f"{len(published.tensors)} tensors", whole)
    findings.attempt(
        "file_hashes", "readable", lambda: files.check_file_hashes(folder, findings), _BROKEN
    )
    files.check_code(folder, findings)
    subject: Subject = findings.attempt(
        "kind", "known", lambda: open_subject(published, source), _BROKEN
    )
    check_student(subject, findings)
    if tensors.check_names(subject, findings):
        tensors.check_bits(subject, findings)
        tensors.check_numbers(subject, findings, findings.report)
    else:
        findings.not_run["hashes and numbers"] = "the tensors are not the model's"

    def around() -> None:
        expected = release_files.gather(subject.source, tokenizer)
        files.check_auto_map(subject, expected, findings)
        files.check_config(subject, expected, findings)
        files.check_prefix_tokens(subject, findings)
        files.check_processor_files(subject, expected, findings)
        files.check_provenance(subject, findings)

    findings.attempt("config_files", "readable", around, _BROKEN)
    return subject


def _check_behaviour(request: Request, subject: Subject, findings: Findings) -> None:
    """What runs the shipped code: processors, then models."""
    from transformers import AutoProcessor

    from checkpoint_tools.certificate import divergence, parity, prompts

    config, bounds = subject.source.config, request.bounds

    def processed() -> Any:
        processor = AutoProcessor.from_pretrained(subject.folder, trust_remote_code=True)
        asked = prompts.make_prompts(prompts.without_pruning(config), bounds.prompts)
        prompts.check_prompts(processor, config, asked, bounds.pixels, findings)
        return processor, asked

    processor, asked = findings.attempt("processor", "opens and answers", processed, _ANY)

    def answered() -> None:
        parity.check_parity(subject, asked, processor, bounds, findings, findings.report)

    findings.attempt("model", "opens and answers", answered, _ANY)
    if subject.chosen is not None:

        def diverged() -> None:
            divergence.check_divergence(subject, bounds, findings, findings.report)

        findings.attempt("divergence", "measured", diverged, _ANY)


def main(arguments: list[str]) -> int:
    """Write RESULT for REQUEST."""
    guard = NetworkGuard()
    transformers.utils.logging.disable_progress_bar()
    asked = json.loads(Path(arguments[0]).read_text())
    request = Request(**{**asked, "bounds": Bounds(**asked["bounds"])})
    findings = Findings(lambda line: print(line, flush=True))
    source = open_stage(Path(request.against))
    subject = run_checks(request, source, findings)
    findings.none_of("no_network", guard.refused, len(guard.refused), "connections")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    findings.figures["peak_memory_gb"] = round(peak / 1e9, 3)
    result = {
        "format": subject.format if subject else None,
        "layout": subject.chosen.layout if subject and subject.chosen else None,
        "checks": [asdict(check) for check in findings.checks],
        "not_run": findings.not_run,
        "figures": findings.figures,
        "passed": findings.passed,
    }
    Path(arguments[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

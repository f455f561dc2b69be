"""`mvl data convert`: a public set to a source the loader reads, stopped and resumed at will.

The output folder holds `train-*.tar` and `val-*.tar`, energon's index in `.nv-meta`,
`conversion.json` and `findings.jsonl`. Until all is done it holds `.convert` with the finished
tasks' reports and no `.nv-meta`, so it is no source yet. A kill at any moment costs the tasks that
were running; `resume` does them again, to the bytes an undisturbed conversion writes.

Nemotron v2 sets are not copied: see `native.py` beside this file.
Cost: the reading and writing of the bytes, and about 0.3 ms a row on each worker.
"""

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.convert import native
from megatron_vl.data.convert.findings import (
    FINDINGS,
    IDS,
    LISTED_ROWS,
    REPORT,
    Finding,
    by_reason,
    duplicate_ids,
    write_findings,
)
from megatron_vl.data.convert.formats import FORMATS, media_roots, source_files
from megatron_vl.data.convert.job import STATE, Job, Task, plan_tasks
from megatron_vl.data.convert.media import write_catalogue
from megatron_vl.data.convert.rows import find_rows
from megatron_vl.data.convert.writer import TaskReport, ids_file, report_file, run_task
from megatron_vl.data.index import META, SPLITS, list_shards, publish, write_index
from megatron_vl.data.workers import each
from megatron_vl.run.atomic import write_text

Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


_FINDING = "finding rows, bytes"


@dataclass(frozen=True)
class Request:
    """What was asked for; see `mvl data convert --help`."""

    format: str
    source: Path
    out: Path
    media_root: Path | None = None
    shard_size: int = 2 * 10**9
    workers: int = 1
    limit: int = 0
    fraction: float = 1.0
    held_out: float = 0.01
    seed: int = 1234
    strict: bool = True
    resume: bool = False


class FirstFault(ValueError):
    """A strict conversion met a row that cannot be used."""


def convert(request: Request, tell: Tell = lambda doing, done, total: None) -> dict[str, Any]:
    """Convert a source; returns its report, which `conversion.json` holds too.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the request or the source cannot be used as it is; the output folder holds
            something else; no row could be kept.
        FirstFault: a row has a fault and the request is strict.
    """
    job = make_job(request)
    digest = job.digest()
    found = read_report(request.out)
    if found is not None:
        if found["digest"] != digest:
            raise ValueError(
                f"{request.out} holds another conversion, or this one of an older source; give "
                "another --out, or remove that folder first"
            )
        shutil.rmtree(job.state, ignore_errors=True)
        return found
    _claim(job, digest, resume=request.resume)
    with _lock(job.state):
        tasks = _prepare(job, request.workers, tell)
        reports = _run(job, tasks, request, tell)
        report = _finish(job, digest, tasks, reports, request.workers, tell)
    shutil.rmtree(job.state)
    return report


def make_job(request: Request) -> Job:
    """The job of a request; raises as `convert` does."""
    kind = FORMATS.get(request.format)
    if kind is None:
        raise ValueError(f"no format {request.format!r}; there are {', '.join(FORMATS)}")
    for name, value in (("fraction", request.fraction), ("held-out", request.held_out)):
        if not 0 <= value <= 1:
            nearest = min(max(value, 0.0), 1.0)
            raise ValueError(f"--{name} is {value}; it must lie in 0 ... 1, the nearest: {nearest}")
    if request.limit < 0 or request.shard_size < 1:
        raise ValueError("--limit counts rows and --shard-size bytes; neither is below zero")
    out = request.out
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", out.absolute().name)
    files = source_files(kind, request.source)
    roots = [root.absolute() for root in media_roots(kind, request.source, request.media_root)]
    tars = sorted(tar for root in roots for tar in root.glob("*.tar"))
    return Job(
        format=kind.name,
        name=name,
        out=out,
        files=tuple(file.absolute() for file in files),
        labels=tuple(_label(file, request.source) for file in files),
        roots=tuple(roots),
        tars=tuple(dict.fromkeys(tars)),
        shard_size=request.shard_size,
        fraction=request.fraction,
        held_out=request.held_out,
        limit=request.limit,
        seed=request.seed,
    )


def _label(file: Path, source: Path) -> str:
    return str(file.relative_to(source)) if source.is_dir() else file.name


def read_report(out: Path) -> dict[str, Any] | None:
    """The report of a finished conversion, None where there is none."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if (out / META).is_dir() and "digest" in report else None


def _claim(job: Job, digest: str, *, resume: bool) -> None:
    """Make the state folder, or go on with the one that is there."""
    plan = job.state / "plan.json"
    if not plan.is_file():
        if job.out.exists() and any(path.name != STATE for path in job.out.iterdir()):
            raise ValueError(
                f"{job.out} holds files that no conversion made; give another --out, or empty it"
            )
        shutil.rmtree(job.state, ignore_errors=True)
        job.state.mkdir(parents=True)
        write_text(plan, json.dumps({"digest": digest}))
        return
    if not resume:
        raise ValueError(
            f"{job.out} holds an unfinished conversion; go on with --resume, or remove the folder"
        )
    if json.loads(plan.read_text(encoding="utf-8"))["digest"] != digest:
        raise ValueError(
            f"{job.out} was begun with other options, or the source has changed since; remove it "
            "to start over, or repeat the first command with --resume"
        )


@contextlib.contextmanager
def _lock(state: Path) -> Iterator[None]:
    """Keep a second conversion out of the folder; the system frees the lock however this ends."""
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another conversion is writing {state.parent}") from None
        yield


def _prepare(job: Job, workers: int, tell: Tell) -> list[Task]:
    """Find the rows, list the tars, plan the tasks; what an earlier attempt found is kept."""
    for part in [*job.out.glob(".*.part"), *job.state.glob("*.part")]:
        part.unlink()
    before, total = 0, sum(path.stat().st_size for path in job.files)
    for number, path in enumerate(job.files):
        kept = job.places_file(number)
        if not kept.exists():
            part = kept.with_suffix(".part")
            places = find_rows(path, partial(_tell_place, tell, before, total))
            with part.open("wb") as file:
                np.save(file, places)
            part.rename(kept)
        before += path.stat().st_size
        tell(_FINDING, before, total)
    if job.kind.native:
        native.index_media(job, workers, lambda done, total: tell("reading tars", done, total))
    elif job.catalogue is not None and not job.catalogue.exists():
        problems = {}
        for tar, problem in zip(job.tars, write_catalogue(job.catalogue, job.tars), strict=True):
            tell("listing tars", job.tars.index(tar) + 1, len(job.tars))
            if problem:
                problems[tar.name] = problem
        write_text(job.media_faults, json.dumps(problems))
    return plan_tasks(job)


def _tell_place(tell: Tell, before: int, total: int, place: int) -> None:
    tell(_FINDING, before + place, total)


def _run(job: Job, tasks: Sequence[Task], request: Request, tell: Tell) -> list[TaskReport]:
    """Do the tasks that are not done; returns the reports of all, in order."""
    done = {task for task in tasks if report_file(job, task).exists()}
    before = sum(task.rows for task in done)
    total = sum(task.rows for task in tasks)
    waiting = [task for task in tasks if task not in done]
    work = partial(native.check_task if job.kind.native else run_task, job, strict=request.strict)
    tell("converting", before, total)
    made = each(
        work,
        waiting,
        workers=min(request.workers, max(len(waiting), 1)),
        tell=lambda rows: tell("converting", before + rows, total),
    )
    with contextlib.closing(made):  # type: ignore[type-var]
        for report in made:
            if report.stopped:
                raise FirstFault(
                    f"{report.findings[-1].text()}\nTo leave such rows out and go on from here, "
                    "use --skip-missing --resume; finished shards stay"
                )
    return [TaskReport.read(report_file(job, task)) for task in tasks]


def _finish(
    job: Job,
    digest: str,
    tasks: Sequence[Task],
    reports: Sequence[TaskReport],
    workers: int,
    tell: Tell,
) -> dict[str, Any]:
    """Write the index and the report, the index's name last: with it the folder is a source."""
    findings = _findings(job, tasks, reports)
    report = {"digest": digest, **_report(job, reports, findings)}
    write_findings(job.out / FINDINGS, findings)
    meta = job.state / "nv-meta"
    if job.kind.native:
        native.write_rows(job, tasks, meta)
    else:
        shutil.rmtree(meta, ignore_errors=True)
        splits = {
            split: [shard["name"] for shard in report["shards"] if shard["split"] == split]
            for split in SPLITS
        }
        every = [name for split in SPLITS for name in splits[split]]
        listings = list_shards(
            job.out, every, workers=workers, tell=lambda done, total: tell("index", done, total)
        )
        write_index(job.out, meta, listings, splits)
    write_text(job.out / REPORT, json.dumps(report, indent=1) + "\n")
    publish(meta, job.out)
    return report


def _findings(job: Job, tasks: Sequence[Task], reports: Sequence[TaskReport]) -> list[Finding]:
    """What all tasks found, and duplicates over all of them, in the order of the rows."""
    order = {name: number for number, name in enumerate(job.labels)}
    ids = [np.load(ids_file(job, task)) for task in tasks]
    findings = [found for report in reports for found in report.findings]
    findings += duplicate_ids(np.concatenate([np.empty(0, dtype=IDS), *ids]), job.labels)
    return sorted(findings, key=lambda found: (order[found.file], found.row))


def _report(job: Job, reports: Sequence[TaskReport], findings: Sequence[Finding]) -> dict[str, Any]:
    """What `conversion.json` says; refuses a conversion that kept nothing."""
    faults = [found for found in findings if not found.keeps]
    kept = {split: sum(report.kept[split] for report in reports) for split in SPLITS}
    if not sum(kept.values()):
        why = f"; the first: {faults[0].text()}" if faults else ""
        raise ValueError(f"no row of {', '.join(job.labels)} could be kept{why}")
    broken = {}
    if job.media_faults.exists():
        broken = json.loads(job.media_faults.read_text(encoding="utf-8"))
    options = ("shard_size", "fraction", "held_out", "limit", "seed")
    chosen = sum(report.chosen for report in reports)
    assert chosen == sum(kept.values()) + len(faults), "a row was lost"
    return {
        "format": job.format,
        "source": job.name,
        "options": {name: getattr(job, name) for name in options},
        "files": [
            {"name": name, "rows": len(job.places(number))}
            for number, name in enumerate(job.labels)
        ],
        "rows": sum(report.rows for report in reports),
        "chosen": chosen,
        "kept": kept,
        "dropped": len(faults),
        "by_reason": by_reason(faults),
        "notes": by_reason([found for found in findings if found.keeps]),
        "media": {
            kind: sum(report.media[kind] for report in reports)
            for kind in ("image", "video", "bytes")
        },
        "broken_media": dict(list(broken.items())[:LISTED_ROWS]),
        "shards": [shard for report in reports for shard in report.shards],
    }

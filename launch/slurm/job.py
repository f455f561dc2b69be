"""The books of a stage's job: what its script asks before and after the ranks run.

`mvl job-begin` settles an attempt that was cut off without a word, checks the parent's receipt and
digest, and opens the next attempt. `mvl job-end` reads what the ranks left, names the class of the
ending and decides: done, again, stopped or held. Both talk to the script in words on standard
output and to people on standard error, which is the job's log. Neither asks Slurm anything, so they
run inside a container too; what Slurm knows is passed to them.

Costs half a second each, and at the start a read of the parent's checkpoint for its digest.
"""

import os
import sys
import time
from argparse import Namespace
from dataclasses import replace
from datetime import datetime

from launch import exit_codes
from launch.attempt import (
    Events,
    begin_attempt,
    counts,
    saved_step,
    statement,
    write_own_receipt,
)
from launch.causes import Cause, classify
from launch.gates import settle_gate
from launch.graph import num_ranks
from launch.ports import free_port
from launch.post_mortem import Findings, write_post_mortem
from launch.site import load_site
from launch.site_schema import RequeueSection
from launch.slurm.budget import Decision, Ending, decide, endings
from launch.slurm.evidence import BEGIN_MARK, Account, gather
from launch.slurm.left_out import ever_left_out, left_out
from launch.slurm.verdict import verdict
from launch.submission import SITE_FILE
from megatron_vl.config.recipe import load_work
from megatron_vl.run.folder import NotTakenError, ParentError, RunFolder, StageFolder
from megatron_vl.run.receipt import Receipt, ReceiptError, now
from megatron_vl.run.stop import Stop

NO_NODES = "-"
_HANGS = "the ranks did not stop after the warning and were ended: they hang"


def begin(args: Namespace) -> int:
    """Open the next attempt; prints `start ATTEMPT PORT`, `done`, or `held`."""
    run = RunFolder(args.run)
    stage = run.stage(args.stage)
    receipt = settle_gate(run, stage)
    if receipt is not None and receipt.held_by_gate:
        _say(receipt.reason)
        print("held")
        return exit_codes.OK
    if counts(run, stage):
        _say(f"{stage.name} is done; nothing to do")
        print("done")
        return exit_codes.OK
    if _is_cancelled(run.journal.read(), stage.name):
        _say(f"{stage.name} was cancelled (mvl cancel); nothing was started")
        print("held")
        return exit_codes.OK
    if not _settled(run, stage):
        held = _settle(run, stage)
        if held:
            _say(held)
            print("held")
            return exit_codes.OK
    work = load_work(stage.work_path)
    try:
        attempt = begin_attempt(run, stage, work)
    except NotTakenError as error:
        _say(str(error))
        print("done")  # for the queue: what waits behind it reads the receipts and ends so too
        return exit_codes.OK
    except (ParentError, ReceiptError) as error:
        _say(str(error))
        print("held")
        return exit_codes.OK
    run.journal.append(
        "started",
        stage=stage.name,
        attempt=attempt,
        ranks=num_ranks(work),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        from_step=saved_step(run.journal.read(), stage.name),
    )
    _say(BEGIN_MARK.format(attempt=attempt))
    print(f"start {attempt} {free_port()}")
    return exit_codes.OK


def end(args: Namespace) -> int:
    """Close an attempt; prints `done`, `stopped`, `held`, or `again` and, where they may have
    changed, the nodes to leave out (`-` for none)."""
    run = RunFolder(args.run)
    stage = run.stage(args.stage)
    if stage.last_attempt() != args.attempt:
        _say(f"attempt {stage.last_attempt()} has begun since; this one decides nothing")
        print("stopped")
        return exit_codes.OK
    if args.warned or args.asked:
        what = "USR1" if args.warned else "TERM"
        run.journal.append("signalled", stage=stage.name, attempt=args.attempt, signal=what)
    word = _close(run, stage, args.attempt, args.slurm, hung=bool(args.hung))
    if word == "again" and ever_left_out(events := run.journal.read()):
        exclude = load_site(str(run.path / SITE_FILE)).job.exclude
        word += " " + (",".join(dict.fromkeys([*exclude, *left_out(events)])) or NO_NODES)
    print(word)
    return exit_codes.OK


def _settle(run: RunFolder, stage: StageFolder) -> str:
    """Close an attempt that was cut off before its job could; why to hold, if Slurm restarted it
    once too often. A start that a person asked for is never held."""
    attempt = stage.last_attempt()
    job = _started(run.journal.read(), stage, attempt).get("job")
    restarted = job is not None and job == os.environ.get("SLURM_JOB_ID")
    word = _close(run, stage, attempt, "", restarted=restarted)
    receipt = stage.receipt()
    assert receipt is not None
    _say(f"attempt {attempt} was cut off: {receipt.reason}")
    return receipt.reason if restarted and word == "held" else ""


def _close(
    run: RunFolder,
    stage: StageFolder,
    attempt: int,
    slurm: str,
    *,
    restarted: bool = False,
    hung: bool = False,
) -> str:
    """Write what is missing of an attempt's receipt, journal its end, and decide.

    Args:
        slurm: what Slurm said of the job at the end.
        restarted: Slurm itself started the job again.
        hung: the ranks did not heed the time limit's warning and were ended.
    """
    events = run.journal.read()
    account = gather(stage, attempt, events, slurm)
    looked = _examined(run, stage, attempt, account)
    receipt = stage.receipt()
    if receipt is not None and receipt.done:
        _journal_end(run, receipt, attempt, None, progressed=True)
        judged = settle_gate(run, stage) or receipt
        if not judged.done:
            _say(judged.reason)
        return "done" if judged.done else "held"
    told = (Cause.time_limit, _HANGS) if hung else looked
    cause = told[0] if told else _cause(receipt, account, restarted=restarted)
    if receipt is None:
        words = told[1] if told else _words(account, cause)
        receipt = _write(run, stage, attempt, events, cause, words)
    before = saved_step(events, stage.name, before_attempt=attempt)
    ending = Ending(cause, saved_step(events, stage.name) > before)
    decision = decide(ending, endings(events, stage.name), _budgets(run))
    if not decision.again and cause is not Cause.stopped:
        receipt = _hold(run, stage, attempt, receipt, cause, decision, account)
    _journal_end(run, receipt, attempt, cause, progressed=ending.progressed)
    if cause is Cause.stopped:
        return "stopped"
    if not decision.again:
        return "held"
    run.journal.append("requeued", stage=stage.name, attempt=attempt, cause=cause.value)
    return "again"


def _cause(receipt: Receipt | None, account: Account, *, restarted: bool) -> Cause:
    """The class of an ending; the trainer's own receipt comes before what others tell."""
    found = classify(account.evidence)
    if receipt is not None and receipt.status == "incomplete":
        if found.is_external or found is Cause.time_limit or account.evidence.cancelled:
            return found
        if receipt.reason.startswith(Stop.time_limit.words):
            return Cause.time_limit
        # Ranks beside one that failed are asked to stop too.
        return Cause.stopped if account.result.first_failed is None else found
    silent = account.result.first_failed is None and found is Cause.crashed
    # Slurm started the job again and nobody on the lost node could say why.
    return Cause.node_lost if restarted and silent else found


def _write(
    run: RunFolder,
    stage: StageFolder,
    attempt: int,
    events: Events,
    cause: Cause,
    words: str,
) -> Receipt:
    """The receipt of ranks that left none."""
    begun = _started(events, stage, attempt).get("time", now())
    lost = max(0.0, time.time() - datetime.fromisoformat(begun).timestamp())
    unfinished = cause.is_external or cause in (Cause.time_limit, Cause.stopped)
    return write_own_receipt(
        run,
        stage,
        load_work(stage.work_path),
        "incomplete" if unfinished else "failed",
        f"{cause.value}: {words}",
        started=begun,
        lost=lost,
    )


def _examined(
    run: RunFolder, stage: StageFolder, attempt: int, account: Account
) -> tuple[Cause, str] | None:
    """Journal what the look at the nodes found; what it says of the ending, if anything."""
    found = verdict(stage.attempt_path(attempt))
    if found is None or (found.cause and classify(account.evidence) is not Cause.crashed):
        return None  # nobody looked, or was not let to
    rate = found.all_reduce_gb_s
    run.journal.append(
        "examined", stage=stage.name, attempt=attempt, sick=found.sick, all_reduce_gb_s=rate
    )
    return (found.cause, found.words) if found.cause else None


def _words(account: Account, cause: Cause) -> str:
    """How the ranks ended, as a receipt says it."""
    if cause is Cause.crashed and account.result.first_failed is None:
        return "all ranks ended, but the trainer wrote no receipt"
    return account.ending or "its ranks left no receipt and no word"


def _hold(
    run: RunFolder,
    stage: StageFolder,
    attempt: int,
    receipt: Receipt,
    cause: Cause,
    decision: Decision,
    account: Account,
) -> Receipt:
    """Turn the receipt into `held`, and write the page that says why."""
    started = _started(run.journal.read(), stage, attempt)
    facts = {"job": str(started.get("job")), "nodes": str(started.get("nodes")) or "unknown"}
    facts["last saved step"] = str(saved_step(run.journal.read(), stage.name))
    page = write_post_mortem(
        run, stage, attempt,
        Findings(cause, receipt.reason, decision.reason, account.log, account.slurm_words, facts),
    )  # fmt: skip
    where = page.relative_to(stage.path)
    reason = f"{receipt.reason}\nheld: {decision.reason}; see {where}"
    held = replace(receipt, status="held", reason=reason)
    stage.write_receipt(held)
    return held


def _journal_end(
    run: RunFolder, receipt: Receipt, attempt: int, cause: Cause | None, *, progressed: bool
) -> None:
    run.journal.append(
        "ended",
        stage=receipt.stage,
        attempt=attempt,
        status=receipt.status,
        step=receipt.step,
        cause=cause.value if cause else None,
        progressed=progressed,
        statement=statement(receipt),
    )


def _is_cancelled(events: Events, stage: str) -> bool:
    """Whether a person cancelled this very job while it waited."""
    mine = (stage, os.environ.get("SLURM_JOB_ID"))
    return any(e["event"] == "cancelled" and (e["stage"], e["job"]) == mine for e in events)


def _settled(run: RunFolder, stage: StageFolder) -> bool:
    """Whether the latest attempt's end is on record (or there is none)."""
    attempt = stage.last_attempt()
    return attempt == 0 or any(
        event["event"] == "ended" and event["stage"] == stage.name and event["attempt"] == attempt
        for event in run.journal.read()
    )


def _started(events: Events, stage: StageFolder, attempt: int) -> dict:
    found = [
        event
        for event in events
        if (event["event"], event["stage"], event["attempt"]) == ("started", stage.name, attempt)
    ]
    return found[-1] if found else {}


def _budgets(run: RunFolder) -> RequeueSection:
    return load_site(str(run.path / SITE_FILE)).requeue


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

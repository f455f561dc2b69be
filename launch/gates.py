"""Gates: what must hold of a finished stage before the stages behind it start.

A gate is judged when its stage has ended, by whoever keeps the books there, and once more before a
stage behind it starts, in case nobody came to it. The verdict and every value go into the receipt
(`gate`) and the journal (`gated`). A gate that holds turns the receipt into `held`; the checkpoint
stays what it is, so `mvl gate override`, or other bounds and a resume, let the chain go on without
training anything again. A gate that branches closes the ways it does not take.

Refuses: to override what no gate holds, and to do so without a reason.
"""

import getpass
import platform
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_vl.config.recipe import gate_of, load_work
from megatron_vl.config.schema_gate import GateConfig
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.receipt import Receipt, now

PAGE = "gate.md"
_RULES = {
    "at_least": "at least {bound:g}",
    "at_most": "at most {bound:g}",
    "drop_at_most": "at most {bound:g} below {reference}",
    "rise_at_most": "at most {bound:g} above {reference}",
}


@dataclass(frozen=True)
class Check:
    """One bound of a gate and what was found.

    Attributes:
        metric: name of the metric.
        rule: key of the gate that bounds it.
        bound: the number written there.
        value: what the stage measured; None when it measured no such thing.
        compared: what the gate's reference measured, for the rules that compare.
        passed: whether the bound holds. A value that is missing or no number passes nothing.
    """

    metric: str
    rule: str
    bound: float
    value: float | None
    compared: float | None
    passed: bool

    def words(self, reference: str) -> str:
        """The check as a sentence: `code.loss is 4.21, wanted at most 3.9`."""
        if self.value is None:
            return f"{self.metric} was not measured, wanted {self.wanted(reference)}"
        return f"{self.metric} is {self.value:g}, wanted {self.wanted(reference)}"

    def wanted(self, reference: str) -> str:
        """The bound in words."""
        wanted = _RULES[self.rule].format(bound=self.bound, reference=reference)
        if self.rule in ("at_least", "at_most"):
            return wanted
        found = "has none" if self.compared is None else f"has {self.compared:g}"
        return f"{wanted}, which {found}"


def judge(
    gate: GateConfig, metrics: Mapping[str, Any], reference: Mapping[str, Any]
) -> list[Check]:
    """Every bound of a gate against the metrics of its stage and of its reference."""
    return [
        _check(metric, rule, bound, _number(metrics, metric), _number(reference, metric))
        for rule in _RULES
        for metric, bound in getattr(gate, rule).items()
    ]


def _check(metric: str, rule: str, bound: float, value: float | None, other: float | None) -> Check:
    compares = rule in ("drop_at_most", "rise_at_most")
    passed = False
    if value is not None and not (compares and other is None):
        start = other if compares and other is not None else 0.0
        # Written so that a NaN passes nothing.
        passed = value >= start - bound if rule == "drop_at_most" else value <= start + bound
        if rule == "at_least":
            passed = value >= bound
    return Check(metric, rule, bound, value, other if compares else None, passed)


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def settle_gate(run: RunFolder, stage: StageFolder) -> Receipt | None:
    """Judge the gate of a stage that ran to its end, if its verdict is missing or held it.

    Returns:
        The receipt as it stands afterwards; None when the stage has none.
    """
    receipt = stage.receipt()
    if receipt is None or not (receipt.done or receipt.held_by_gate):
        return receipt
    gate = gate_of(load_work(stage.work_path))
    judged = receipt.gate.get("asked") == asdict(gate)
    if (judged and receipt.done) or (not gate.asks and not receipt.gate):
        return receipt
    compared = run.stage(gate.reference).receipt() if _is_there(run, gate.reference) else None
    checks = judge(gate, receipt.metrics, compared.metrics if compared else {})
    verdict = _verdict(run, stage, gate, checks)
    before = receipt.gate.get("ended", receipt.reason)
    failed = "; ".join(check.words(gate.reference) for check in checks if not check.passed)
    held = verdict["decision"] == "hold"
    reason = before
    if held:
        page = _write_page(run, stage, receipt, gate, checks)
        reason = f"gate: {failed}; see {page}"
    changed = replace(
        receipt,
        status="held" if held else "done",
        reason=reason,
        gate=verdict | {"ended": before} if gate.asks else {},
    )
    if changed != receipt:
        stage.write_receipt(changed)
        run.journal.append(
            "gated",
            stage=stage.name,
            attempt=stage.last_attempt(),
            decision=verdict["decision"],
            reason=failed or "every bound of the gate holds",
            checks=verdict["checks"],
        )
    return changed


def _verdict(
    run: RunFolder, stage: StageFolder, gate: GateConfig, checks: list[Check]
) -> dict[str, Any]:
    """What follows: continue, branch or hold, with the ways that are open and closed."""
    children = run.graph().children(stage.name)
    passed = all(check.passed for check in checks)
    decision = "continue" if passed else gate.otherwise
    if decision == "branch" and gate.branch_to not in children:
        decision = "hold"  # what it would branch to is skipped
    target = [name for name in children if name == gate.branch_to]
    others = [name for name in children if name != gate.branch_to]
    ways = {"continue": (others, target), "branch": (target, others), "hold": ([], [])}
    taken, closed = ways[decision]
    return {
        "decision": decision,
        "passed": passed,
        "checks": [asdict(check) for check in checks],
        "open": taken,
        "closed": closed,
        "asked": asdict(gate),
    }


def _is_there(run: RunFolder, name: str) -> bool:
    return bool(name) and name in [stage.name for stage in run.stages()]


def _write_page(
    run: RunFolder, stage: StageFolder, receipt: Receipt, gate: GateConfig, checks: list[Check]
) -> str:
    """The page a person finds when a gate holds; returns its path from the stage's folder."""
    path = stage.attempt_path(receipt.attempts) / PAGE
    behind = ", ".join(run.graph().descendants(stage.name)) or "nothing"
    command = ["mvl", "gate", "override", str(run.path), stage.name, "--reason", "WHY"]
    lines = [f"# The gate of {stage.name} holds", ""]
    lines += [f"{stage.name} ran to its end ({receipt.reason}). Waiting behind it: {behind}.", ""]
    lines += ["| metric | found | wanted | |", "|---|---|---|---|"]
    for check in checks:
        found = "not measured" if check.value is None else f"{check.value:g}"
        word = "holds" if check.passed else "**does not hold**"
        lines.append(f"| {check.metric} | {found} | {check.wanted(gate.reference)} | {word} |")
    known = ", ".join(f"{name} {value}" for name, value in receipt.metrics.items())
    lines += ["", f"All that was measured: {known or 'nothing'}.", "", "## What to try", ""]
    lines += [
        "- Look at what came before it: a stage left out or cut short shows here first "
        f"(`mvl status {shlex.quote(str(run.path))}`).",
        "- Train the stage before it longer or on other data, in a run of its own.",
        "- If the bound is wrong, change it in the stage's file and submit the recipe again: the "
        "verdict is made anew and nothing is trained twice.",
        f"- To go on all the same, on record: `{shlex.join(command)}`",
        "",
    ]
    atomic.write_text(path, "\n".join(lines))
    return str(path.relative_to(stage.path))


def override(run: RunFolder, stage: StageFolder, reason: str, who: str) -> Receipt:
    """Let a chain go on behind a gate that holds, on record. Raises RunError."""
    receipt = settle_gate(run, stage)
    if not reason.strip():
        raise RunError("--reason is empty; say why the chain may go on, it goes on record")
    if receipt is None or not receipt.held_by_gate:
        state = "has not ended yet" if receipt is None else f"is {receipt.status}"
        held = [s.name for s in run.stages() if (r := s.receipt()) is not None and r.held_by_gate]
        there = f"held by their gates are {', '.join(held)}" if held else "no gate holds here"
        raise RunError(f"{stage.name} {state}, and no gate holds it; {there}")
    record = {"who": who, "when": now(), "why": reason}
    changed = replace(
        receipt,
        status="done",
        reason=f"{receipt.gate['ended']}; its gate was overridden by {who}: {reason}",
        gate=receipt.gate | {"override": record},
    )
    stage.write_receipt(changed)
    run.journal.append("overridden", stage=stage.name, attempt=receipt.attempts, **record)
    return changed


def person() -> str:
    """Who runs this command, as `name@host`."""
    return f"{getpass.getuser()}@{platform.node()}"


def main(args: Namespace) -> int:
    """`mvl gate override`: put it on record, then go on with the run."""
    from launch.submit import resume

    run = RunFolder(args.run)
    stage = run.stage(args.stage)
    override(run, stage, args.reason, person())
    print(f"{stage.name}: gate overridden; it is in the receipt and the journal", flush=True)
    args.first = None
    return resume(args)

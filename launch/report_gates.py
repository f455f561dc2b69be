"""What the page about a run says of gates and of releases, from receipts and certificates."""

import json
from typing import Any

from launch.gates import Check
from launch.status import gate_word
from megatron_vl.run.folder import RunFolder

_CERTIFICATE, _PAGE = "certificate.json", "certificate.html"


def gate_tables(run: RunFolder) -> list[dict[str, Any]]:
    """Each gate that was judged: its stage, verdict, checks in words, and who overrode it."""
    found = []
    for stage in run.stages():
        receipt = stage.receipt()
        if receipt is None or not receipt.gate:
            continue
        reference = receipt.gate["asked"]["reference"]
        checks = [Check(**check) for check in receipt.gate["checks"]]
        found.append(
            {
                "stage": stage.name,
                "verdict": gate_word(receipt),
                "override": receipt.gate.get("override"),
                "checks": [
                    {
                        "metric": check.metric,
                        "value": "not measured" if check.value is None else f"{check.value:g}",
                        "wanted": check.wanted(reference),
                        "passed": check.passed,
                    }
                    for check in checks
                ],
            }
        )
    return found


def releases(run: RunFolder) -> list[dict[str, Any]]:
    """Each released format: where it lies, what it was made of and what its certificate counts.

    One that is not there any more, or whose certificate is not what the receipt recorded, is left
    out: the page states what can be found.
    """
    found = []
    for stage in run.stages():
        receipt = stage.receipt()
        if receipt is None or receipt.kind != "release" or not receipt.done:
            continue
        sources = run.sources(stage)
        for place in receipt.outputs:
            folder = run.path / place
            if not (folder / _CERTIFICATE).is_file() or folder.name not in sources:
                continue
            made = json.loads((folder / _CERTIFICATE).read_text(encoding="utf-8"))
            found.append(
                {
                    "format": folder.name,
                    "place": place,
                    "page": f"{place}/{_PAGE}" if (folder / _PAGE).is_file() else "",
                    "source": sources[folder.name].name,
                    "digest": receipt.outputs[place],
                    "passed": sum(bool(check["passed"]) for check in made["checks"]),
                    "checks": len(made["checks"]),
                    "not_run": ", ".join(made.get("not_run", {})),
                }
            )
    return found

"""`mvl checkpoint certify`: a release's certificate, made by a fresh process without a network.

Leaves `certificate.json` and a readable `certificate.html` in the release. Every bound stands
beside its measurement; a bound other than the published one is listed as such.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_tools.certificate.check import CERTIFICATE_FILE, PAGE_FILE, SCHEMA, Bounds
from checkpoint_tools.certificate.page import certificate_page
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import provenance
from checkpoint_tools.published_folder import CONFIG_FILE
from checkpoint_tools.stage_source import StageSource, open_stage
from megatron_vl.run import atomic
from megatron_vl.run.receipt import now
from megatron_vl.run.versions import versions

_LONGEST_S = 12 * 3600
_SMALL = 10**8
_OF_SMALL_MODELS = (
    "This model has fewer than 10^8 parameters. Quantization loses the same share of each weight "
    "at any size, but a narrow layer adds up few of these errors where a wide one averages over "
    "thousands, and a little-trained model has many near-equal candidates at each place. A failed "
    "kl or top1 here means that this model is too small or too little trained for the format (keep "
    "bf16, train longer, or train it with the format in the loop); every other check means at this "
    "size what it means at 12 billion parameters."
)


def certify(
    folder: Path,
    against: Path,
    report: Callable[[str], None],
    bounds: Bounds | None = None,
    tokenizer: Path | None = None,
    figures: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Certify a release against its checkpoint; writes certificate and page into it.

    Args:
        tokenizer: as export's option.
        figures: what was measured before, to stand beside what is measured here.

    Returns:
        The certificate.

    Raises:
        ConversionError: no release lies there.
        ConversionError, RunError: the checkpoint cannot be opened.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConversionError(f"{folder} is no release: it holds no {CONFIG_FILE}")
    source, bounds = open_stage(against), bounds or Bounds()
    request = {
        "folder": str(folder.resolve()),
        "against": str(against.resolve()),
        "tokenizer": str(tokenizer.resolve()) if tokenizer else "",
        "bounds": asdict(bounds),
    }
    result = _in_fresh_process(request, report)
    result["figures"] = {**(figures or {}), **result["figures"]}
    made = _certificate(source, bounds, result)
    atomic.write_text(folder / CERTIFICATE_FILE, json.dumps(made, indent=1) + "\n")
    atomic.write_text(folder / PAGE_FILE, certificate_page(made, folder.name))
    return made


def failures(certificate: dict[str, Any]) -> list[str]:
    """Everything that failed or could not be run, a line each."""
    lines = [
        f"{check['name']}: {check['says'] or check['measured']} (bound {check['bound']})"
        for check in certificate["checks"]
        if not check["passed"]
    ]
    lines += [f"not run: {what}: {why}" for what, why in certificate["not_run"].items()]
    return lines


def _in_fresh_process(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """The worker's result; a worker that ends without one is a failed check."""
    with tempfile.TemporaryDirectory(prefix="mvl-") as base:
        asked, result = Path(base) / "request.json", Path(base) / "result.json"
        asked.write_text(json.dumps(request))
        words = [sys.executable, "-m", "checkpoint_tools.certificate.worker", asked, result]
        process = subprocess.Popen(
            list(map(str, words)),
            env=offline_environment(Path(base)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        clock = threading.Timer(_LONGEST_S, process.kill)
        clock.start()
        last = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                report(line.rstrip())
            process.wait()
        finally:
            clock.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0 and result.is_file():
            return dict(json.loads(result.read_text()))
    ended = f"the process ended with {process.returncode}; its last line: {last}"
    lost = {"name": "process", "passed": False, "measured": "ended early", "bound": "ends in order"}
    return {
        "format": None,
        "layout": None,
        "checks": [{**lost, "says": ended}],
        "not_run": {},
        "figures": {},
        "passed": False,
    }


def offline_environment(home: Path) -> dict[str, str]:
    """This environment without proxies and caches, Hugging Face's libraries offline."""
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
    kept = {n: v for n, v in kept.items() if not n.startswith(("HF_", "TRANSFORMERS_"))}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}
    return {**kept, **offline, **quiet, "HF_HOME": str(home / "hf"), "PYTHONPATH": path}


def _certificate(source: StageSource, bounds: Bounds, result: dict[str, Any]) -> dict[str, Any]:
    known = provenance(source)
    parameters = sum(math.prod(spec.shape) for spec in source.checkpoint.tensors.values())
    return {
        "schema": SCHEMA,
        "passed": result["passed"],
        "format": result["format"],
        "layout": result["layout"],
        "checkpoint": {
            "digest": source.digest,
            "stage": known["stage"],
            "step": known["step"],
            "data_cursor": known["data_cursor"],
            "config_hash": known["config_hash"],
            "receipt": known["receipt"],
            "lineage": known["lineage"],
            "parameters": parameters,
        },
        "checks": result["checks"],
        "not_run": result["not_run"],
        "figures": result["figures"],
        "changed_bounds": bounds.changed(),
        "note": _OF_SMALL_MODELS if parameters < _SMALL else "",
        "made": now(),
        "made_with": versions(),
    }

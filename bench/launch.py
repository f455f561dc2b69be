"""What launching costs: commands on a login node, and a chain's hops beside a hand-written one.

    .venv/bin/python -m bench.launch

Brings up a Slurm of this machine (needs `apt-get install slurmctld slurmd slurm-client munge`) and
runs the same six stages of two ranks in three ways, in turns, in one run: a chain of `sbatch
--dependency=afterok` scripts as one would write them by hand, `mvl`'s chain, and `mvl`'s chain with
the look at its nodes. The ranks take no time (tests/slurm/fake_rank.py), so what is left is the
launching. A hop's overhead is the difference in wall time over the number of stages.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from launch.graph import Selection
from launch.slurm import chain, queue
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder, StageFolder
from slurm.loopback.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
FAKE_RANK = ROOT / "tests" / "slurm" / "fake_rank.py"
STAGES = ("init", "stage0", "stage1", "stage2", "stage3", "stage4")
PACE = "0.01"
_PATIENCE_SECONDS = 180.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each chain; default: 3")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as place:
        cluster = Cluster(Path(place) / "cluster", nodes=2, gpus=0)
        cluster.up_while_alive()
        os.environ.update(cluster.variables)
        try:
            _commands(Path(place))
            _hops(Path(place), rounds)
        finally:
            cluster.down()


def _commands(place: Path) -> None:
    """Wall times of the commands an operator waits for, each in a new process: best of five."""
    run = _new_run(place / "commands", doctor=False)
    asked = {
        "import of the command line": [],
        "mvl plan, 12B on a cluster": ["plan", "stages/nano_12b_v2_vl", "--site", "example-pyxis"],
        "mvl status": ["status", str(run.path)],
    }
    for name, words in asked.items():
        argv = ["-m", "launch.cli", *words] if words else ["-c", "import launch.cli"]
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        print(f"{name}: {min(times):.2f} s")
    begun = time.perf_counter()
    chain.send(run, STAGES, lambda stage: ["-c", "pass"])
    print(f"submission of {len(STAGES)} stages: {time.perf_counter() - begun:.2f} s")
    queue.cancel([job.id for jobs in queue.jobs_by_stage(run).values() for job in jobs])


def _hops(place: Path, rounds: int) -> None:
    """The three chains in turns."""
    ways = {"by hand": _by_hand, "mvl": _by_mvl, "mvl with the look at its nodes": _by_mvl}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            run = _new_run(place / f"{number}.{len(name)}", doctor="look" in name)
            begun = time.perf_counter()
            way(run)
            _wait_done(run)
            times[name].append(time.perf_counter() - begun)
    hand = statistics.median(times["by hand"])
    for name, found in times.items():
        middle = statistics.median(found)
        over = f", {(middle - hand) / len(STAGES):+.2f} s a stage" if name != "by hand" else ""
        told = ", ".join(f"{seconds:.1f}" for seconds in found)
        print(f"chain of {len(STAGES)} stages, {name}: {middle:.1f} s ({told}){over}")


def _new_run(folder: Path, *, doctor: bool) -> RunFolder:
    """A run folder of six stages of two steps on two ranks."""
    recipe = folder / "recipe"
    recipe.mkdir(parents=True)
    for name in STAGES:
        laptop = ROOT / "stages" / "laptop" / f"{name}.yaml"
        if name == "init":
            laptop = ROOT / "tests" / "support" / "stages" / "init.yaml"
        after = "" if name == STAGES[0] else f"after: {STAGES[STAGES.index(name) - 1]}\n"
        layout = "parallel: {context: 1, data: 2}\n"
        text = f"base: {laptop}\n{layout}train: {{steps: 2}}\n{after}"
        (recipe / f"{name}.yaml").write_text(text)
    site = yaml.safe_load((ROOT / "slurm" / "sites" / "loopback.yaml").read_text())
    site["doctor"]["enabled"] = doctor
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    run = RunFolder(folder / "run")
    prepare(recipe, run, Selection(), str(folder / "site.yaml"))
    return run


def _rank(run: RunFolder, stage: StageFolder) -> list[str]:
    return [str(FAKE_RANK), str(run.path), stage.name, PACE]


def _by_mvl(run: RunFolder) -> None:
    chain.send(run, STAGES, lambda stage: _rank(run, stage))


def _by_hand(run: RunFolder) -> None:
    """What one writes without `mvl`: the ranks, and nothing that looks at how they ended."""
    before: list[str] = []
    for name in STAGES:
        stage = run.stage(name)
        stage.start_attempt()  # the fake rank expects its folder
        script = stage.path / "by_hand.sh"
        script.write_text(
            "#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=2 --time=60\n"
            f"#SBATCH --output={stage.path}/by_hand.out\n"
            f"export PYTHONPATH={ROOT} MVL_ATTEMPT=1 MASTER_ADDR=127.0.0.11\n"
            f"srun --kill-on-bad-exit=1 {shlex.join([sys.executable, *_rank(run, stage)])}\n"
        )
        words = ["sbatch", "--parsable", *before, str(script)]
        before = [f"--dependency=afterok:{queue.command(*words)}"]


def _wait_done(run: RunFolder) -> None:
    """Until the last stage's receipt is there."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    path = run.stage(STAGES[-1]).receipt_path
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not come; look at the run's slurm-*.out")
        time.sleep(0.02)


if __name__ == "__main__":
    main()

"""A chain of two stages whose ranks are `fake_rank.py`, on a real Slurm."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launch.graph import Selection
from launch.site import SITES
from launch.slurm import chain, queue
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import Receipt
from slurm.loopback.cluster import Cluster
from tests.launch.small_recipe import write_recipe

FAKE_RANK = Path(__file__).with_name("fake_rank.py")
PATIENCE_SECONDS = 90.0


class FakeChain:
    """A run folder with the stages init and stage0, and what a test does with it.

    Args:
        steps: of each stage; a step takes `pace` seconds.
        site: sections laid over the site `loopback`.
        faults: what goes wrong, as `fake_rank.py` reads it.
        write: writes the recipe into a folder.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        steps: int = 6,
        pace: float = 0.05,
        site: dict[str, Any] | None = None,
        faults: dict[str, Any] | None = None,
        name: str = "run",
        write: Callable[..., Path] = write_recipe,
    ) -> None:
        self.cluster = cluster
        self.steps = steps
        self.pace = pace
        self._requeued: dict[str, float] = {}
        self.recipe = write(folder / "recipe", steps=steps)
        self.site = write_site(folder / "site.yaml", site or {})
        self.run = RunFolder(folder / name)
        prepare(self.recipe, self.run, Selection(), str(self.site))
        if faults:
            (self.run.path / "faults.json").write_text(json.dumps(faults))

    def send(self, *stages: str) -> chain.Sent:
        """Submit or resume, all stages unless some are named."""
        return chain.send(self.run, stages or self.run.plan()["selected"], self.command)

    def command(self, stage: StageFolder) -> list[str]:
        """What each rank runs."""
        return [str(FAKE_RANK), str(self.run.path.resolve()), stage.name, str(self.pace)]

    def wait(
        self, what: str, condition: Callable[[], object], seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Until something is so; requeued jobs do not wait for their credentials to expire."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.hurry()
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.story()}"
            time.sleep(0.1)

    def wait_over(self) -> None:
        """Until no job of the chain can run any more."""
        self.wait("the end", lambda: not any(self.may_run(job) for job in self.jobs()))

    def wait_step(self, stage: str, step: int) -> None:
        """Until a stage has saved a step."""
        self.wait(f"{stage} step {step}", lambda: self.saved(stage) >= step)

    def jobs(self) -> list[queue.QueuedJob]:
        return [job for jobs in queue.jobs_by_stage(self.run).values() for job in jobs]

    def job(self, stage: str) -> queue.QueuedJob:
        """The latest job of a stage."""
        return queue.jobs_by_stage(self.run)[stage][-1]

    @staticmethod
    def may_run(job: queue.QueuedJob) -> bool:
        stuck = job.held or (job.pending and job.reason == "DependencyNeverSatisfied")
        return job.live and not stuck

    def hurry(self) -> None:
        """Start requeued jobs, but not in the second in which their credentials were revoked."""
        now = time.monotonic()
        for job in self.jobs():
            if not job.pending or job.reason != "BeginTime":
                self._requeued.pop(job.id, None)
            elif now - self._requeued.setdefault(job.id, now) > 2.0:
                queue.command("scontrol", "update", f"jobid={job.id}", "StartTime=now")

    def end(self) -> None:
        """Cancel what is left."""
        queue.cancel([job.id for job in self.jobs() if job.live])

    def receipt(self, stage: str) -> Receipt:
        receipt = self.run.stage(stage).receipt()
        assert receipt is not None, f"{stage} has no receipt\n{self.story()}"
        return receipt

    def receipt_status(self, stage: str) -> str:
        """The status of a stage's receipt; empty without one."""
        receipt = self.run.stage(stage).receipt()
        return receipt.status if receipt is not None else ""

    def saved(self, stage: str) -> int:
        """The last step a stage has saved."""
        folders = self.run.stage(stage).checkpoints.glob("step_??????")
        return max((int(f.name.removeprefix("step_")) for f in folders), default=0)

    def assert_causes(self, stage: str, expected: list[str | None]) -> None:
        """What ended each attempt of a stage; None is its last step."""
        ends = [e for e in self.events() if (e["event"], e["stage"]) == ("ended", stage)]
        assert [end["cause"] for end in ends] == expected, self.story()

    def events(self) -> list[dict[str, Any]]:
        return self.run.journal.read()

    def assert_as_undisturbed(self) -> None:
        """Both stages are done, from the right parent, with the weights of a chain left alone."""
        weights = ""
        for name in ("init", "stage0"):
            receipt, stage = self.receipt(name), self.run.stage(name)
            assert receipt.done, self.story()
            for step in range(1, self.steps + 1):
                weights = hashlib.sha256(f"{weights}{name}{step}".encode()).hexdigest()
            assert (stage.checkpoint_path(receipt) / "weights").read_text() == weights
            self.assert_nothing_saved_was_trained_twice(name)
        parent, before = self.receipt("stage0").parent, self.receipt("init").checkpoint
        assert parent is not None
        assert before is not None
        assert parent.digest == before.digest

    def assert_nothing_saved_was_trained_twice(self, stage: str) -> None:
        """Every attempt began at the last step that was saved before it."""
        saved = 0
        for event in self.events():
            if event["stage"] == stage and event["event"] == "started":
                assert event["from_step"] == saved, self.story()
            if event["stage"] == stage and event["event"] == "saved":
                assert event["step"] > saved or event["step"] == 0, self.story()
                saved = event["step"]

    def story(self) -> str:
        """Everything there is to know, for a failing test."""
        parts = [str(job) for job in self.jobs()]
        parts += [json.dumps(event) for event in self.events()]
        for stage in self.run.stages():
            logs = [*stage.path.glob("slurm-*.out"), *stage.path.glob("attempts/*/*.log")]
            parts += [f"--- {log}\n{log.read_text()}" for log in sorted(logs)]
        return "\n".join(parts)


def write_site(path: Path, changes: dict[str, Any]) -> Path:
    """The site `loopback` with other values."""
    site = yaml.safe_load((SITES / "loopback.yaml").read_text())
    site["doctor"] = {"enabled": False}  # a start of Python that most tests need not wait for
    for section, values in changes.items():
        if isinstance(values, dict):
            site[section] = site.get(section, {}) | values
        else:
            site[section] = values
    path.write_text(yaml.safe_dump(site))
    return path

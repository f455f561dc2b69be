"""Jobs that Slurm holds, as after a controller's crash: resuming lets them start, and nothing that
was saved is trained twice. `tests/launch/test_held_jobs.py` asks the same of a made-up queue."""

from collections.abc import Callable

import pytest

from launch.slurm import queue
from tests.slurm.chains import FakeChain

HANGS = {"init": {"1": {"step": 4, "do": "hang"}}}
"""The first attempt saves step 2, then waits to be asked to stop."""


@pytest.mark.distributed
@pytest.mark.slow
def test_resuming_releases_what_the_queue_holds(make_chain: Callable[..., FakeChain]) -> None:
    made = make_chain(faults=HANGS)
    sent = made.send()
    made.wait_step("init", 2)
    queue.command("scontrol", "uhold", made.job("stage0").id)
    queue.command("scontrol", "requeuehold", made.job("init").id)
    made.wait("the hold", lambda: made.job("init").held)
    assert made.job("init").reason == "job requeued in held state"
    assert made.job("stage0").reason == "JobHeldUser"
    again = made.send()
    assert (again.new, again.kept) == ({}, sent.new)
    made.wait_over()
    made.assert_as_undisturbed()
    assert made.receipt("init").attempts == 2

"""What a node's process runs: `mvl node STAGE --run RUN`, started by the supervisor or a job.

The work itself is another `mvl` command, as a child whose words go into the log. What it left is
hashed and goes into the receipt, which is written last. Asked to stop, the child is asked too and
the receipt says `incomplete`; commands that stream go on where they stopped. A child that fails
leaves no receipt here: whoever started the node writes a `failed` one with the child's last words.

Costs a read of what the child wrote, for its digests.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FrameType

from launch import exit_codes
from launch.local import end_with_parent
from launch.nodes.errors import CertificateError, NodeError
from launch.nodes.work import Made, Place, do
from megatron_vl.config.load import config_hash
from megatron_vl.config.load_node import load_node
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import ParentRef, Receipt, Status, now
from megatron_vl.run.stop import Stop
from megatron_vl.run.versions import versions

_LAST_LINES = 4
_ASKED = {signal.SIGUSR1: Stop.time_limit, signal.SIGTERM: Stop.terminated}


@dataclass
class Runner:
    """Runs children one after another and passes requests to stop on to them."""

    name: str
    asked: Stop = Stop.none
    child: "subprocess.Popen[str] | None" = None
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    def listen(self) -> None:
        """Hear USR1 and TERM from now on."""
        for number in _ASKED:
            signal.signal(number, self._note)

    def __call__(self, words: Sequence[str]) -> None:
        """Run a command to its end. Raises NodeError when it fails, StoppedError when asked to."""
        if self.asked is not Stop.none:
            raise StoppedError
        shown = list(words[words.index("launch.cli") + 1 :] if "launch.cli" in words else words)
        print(f"[{self.name}] runs: mvl {' '.join(shown)}", flush=True)
        self.child = subprocess.Popen(
            list(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace",
        )  # fmt: skip
        assert self.child.stdout is not None
        for line in self.child.stdout:
            print(f"[{self.name}] {line.rstrip()}", flush=True)
            if line.strip():
                self.last.append(line.rstrip())
        code = self.child.wait()
        if self.asked is not Stop.none:
            raise StoppedError
        if code != 0:
            said = "\n".join(self.last) or "it printed nothing"
            words = f"`mvl {' '.join(shown[:2])}` exited with status {code}: {said}"
            raise NodeError(words, status=code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, _ASKED[signal.Signals(number)])
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()


class StoppedError(Exception):
    """The node was asked to stop."""


def main(args: Namespace) -> int:
    """Do what the node says and write its receipt."""
    end_with_parent()
    run = RunFolder(args.run)
    stage = run.stage(args.stage)
    attempt = int(os.environ.get("MVL_ATTEMPT", stage.last_attempt()))
    runner = Runner(stage.name)
    runner.listen()
    began, started = time.monotonic(), now()
    receipt = _receipt(run, stage, attempt, started)
    try:
        made = do(Place(run, stage, attempt), runner)
    except StoppedError:
        asked = f"{runner.asked.words}; it goes on where it can"
        _write(stage, receipt, "incomplete", asked, Made(), time.monotonic() - began)
        return exit_codes.INCOMPLETE
    except NodeError as error:
        print(f"mvl node: {error}", file=sys.stderr, flush=True)
        found = isinstance(error, CertificateError)
        return exit_codes.FOUND if found else exit_codes.FAILED
    _write(stage, receipt, "done", made.said, made, time.monotonic() - began)
    print(f"[{stage.name}] {made.said}", flush=True)
    return exit_codes.OK


def _receipt(run: RunFolder, stage: StageFolder, attempt: int, started: str) -> Receipt:
    """What is known before the work: the receipt of a node that has done nothing yet."""
    node = load_node(stage.node_path)
    inputs = {}
    for source in run.sources(stage).values():
        found = source.receipt()
        assert found is not None
        assert found.checkpoint is not None
        inputs[source.name] = found.checkpoint.digest
    first = next(iter(inputs.items()), None)
    return Receipt(
        run=run.name,
        stage=stage.name,
        status="failed",
        reason="nothing done yet",
        step=0,
        attempts=attempt,
        checkpoint=None,
        parent=None if first is None else ParentRef(*first),
        config_hash=config_hash(node),
        data_cursor=None,
        trainable=[],
        started=started,
        ended=started,
        kind=node.node.name,
        inputs=inputs,
        versions=versions(),
    )


def _write(
    stage: StageFolder, receipt: Receipt, status: Status, reason: str, made: Made, took: float
) -> None:
    before = stage.seconds_before(receipt.attempts)
    key = "useful" if status == "done" else "lost"
    seconds = replace(before, **{key: round(getattr(before, key) + took, 3)})
    stage.require_current(receipt.attempts)
    stage.write_receipt(
        replace(
            receipt,
            status=status,
            reason=reason,
            checkpoint=made.checkpoint,
            data_cursor=0 if made.checkpoint else None,
            metrics=made.metrics,
            outputs=made.outputs,
            seconds=seconds,
            ended=now(),
        )
    )

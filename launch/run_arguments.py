"""Commands that plan, run, stop and repair a chain: their arguments, declared without torch."""

from collections.abc import Callable
from typing import Any

RUN = "a run folder, such as runs/demo"
_Command = Callable[..., Any]


def add_run_commands(
    commands: Any, command: _Command, override_arguments: Callable[[Any], None]
) -> None:
    """Declare the commands.

    Args:
        commands: the subparsers of `mvl`.
        command: adds one: (commands, name, handler, text, example).
        override_arguments: lets one take `key=value ...`.
    """
    plan = command(
        commands, "plan", "launch.plan:main", "Say what would run, and check it.",
        "mvl plan stages/laptop train.steps=50",
    )  # fmt: skip
    _recipe_arguments(plan, override_arguments)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--run", metavar="DIR", help="the run folder; default: runs/RECIPE")
    plan.add_argument(
        "--scripts", action="store_true", help="print the job script of every stage too"
    )
    plan.add_argument("--out", metavar="DIR", help="write the job scripts into a folder")
    plan.add_argument(
        "--diff", metavar="RUN", help="list what submitting this would change about a run"
    )
    plan.add_argument(
        "--build-rank", type=int, metavar="R",
        help="build this rank of each stage's layout without its weights (with torch): exact bytes",
    )  # fmt: skip
    plan.add_argument(
        "--format", choices=("table", "nemo-run"), default="table",
        help="nemo-run: print the chain as a Python file for NVIDIA's nemo-run",
    )  # fmt: skip

    submit = command(
        commands, "submit", "launch.submit:submit", "Run the stages of a recipe in order.",
        "mvl submit stages/laptop --run runs/demo --until stage1 --follow",
    )  # fmt: skip
    _recipe_arguments(submit, override_arguments)
    submit.add_argument(
        "--run", required=True, metavar="DIR", help="the run folder, such as runs/a"
    )
    submit.add_argument(
        "--follow", action="store_true",
        help="show progress; on this machine run in the foreground",
    )  # fmt: skip

    submit.add_argument(
        "--rehearse", action="store_true",
        help="on a cluster: the same graph at the laptop's sizes, a few steps on two nodes",
    )  # fmt: skip

    resume = command(
        commands, "resume", "launch.submit:resume", "Go on with a run as it was submitted.",
        "mvl resume runs/demo --from stage1",
    )  # fmt: skip
    resume.add_argument("run", metavar="RUN", help=RUN)
    resume.add_argument("--from", dest="first", metavar="S", help="the first stage to run")
    resume.add_argument("--follow", action="store_true", help="show progress, as for submit")

    cancel = command(
        commands, "cancel", "launch.submit:cancel", "Stop a run and all its processes or jobs.",
        "mvl cancel runs/demo",
    )  # fmt: skip
    cancel.add_argument("run", metavar="RUN", help=RUN)
    cancel.add_argument(
        "--now", action="store_true", help="on a cluster: end running jobs without waiting"
    )
    _add_gate(commands, command)
    _add_nodes(commands, command)
    _add_workers(commands, command, override_arguments)
    _add_job_commands(commands, command)
    _add_doctor(commands, command)


def _add_gate(commands: Any, command: _Command) -> None:
    gate = commands.add_parser("gate", help="Decide about a chain that a gate holds.")
    inside = gate.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    override = command(
        inside, "override", "launch.gates:main", "Go on behind a gate that holds, on record.",
        "mvl gate override runs/demo code_stage3 --reason 'the suite was too small'",
    )  # fmt: skip
    override.add_argument("run", metavar="RUN", help=RUN)
    override.add_argument("stage", metavar="STAGE", help="the stage or node whose gate holds")
    override.add_argument("--reason", required=True, metavar="TEXT", help="why; goes on record")
    override.add_argument("--follow", action="store_true", help="show progress, as for submit")


def _add_nodes(commands: Any, command: _Command) -> None:
    nodes = commands.add_parser("nodes", help="Say which nodes a run leaves out, and change it.")
    inside = nodes.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    handler = "launch.slurm.nodes:main"
    listed = command(
        inside, "list", handler, "List the nodes a run leaves out, and why.",
        "mvl nodes list runs/a",
    )  # fmt: skip
    listed.add_argument("run", metavar="RUN", help=RUN)
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    for name, text in (
        ("exclude", "Leave nodes out of a run's later starts, on record."),
        ("readmit", "Take nodes in again that a run leaves out, on record."),
    ):
        example = f"mvl nodes {name} runs/a node17 --reason 'GPU 3 was replaced'"
        change = command(inside, name, handler, text, example)
        change.add_argument("run", metavar="RUN", help=RUN)
        change.add_argument("nodes", nargs="+", metavar="NODE", help="a node's name")
        change.add_argument("--reason", required=True, metavar="TEXT", help="why; goes on record")


def _add_workers(
    commands: Any, command: _Command, override_arguments: Callable[[Any], None]
) -> None:
    train = command(
        commands, "train", "launch.train:main", "Train one stage as one rank; `submit` calls this.",
        "mvl train runs/demo/stages/01_stage0/config.yaml --run runs/demo",
    )  # fmt: skip
    train.add_argument("config", metavar="FILE", help="a resolved stage of a run folder")
    train.add_argument("--run", required=True, metavar="DIR", help=RUN)
    override_arguments(train)

    node = command(
        commands, "node", "launch.nodes.main:main", "Do what one node says; `submit` calls this.",
        "mvl node release --run runs/demo", hidden=True,
    )  # fmt: skip
    node.add_argument("stage", metavar="NODE", help="a node of the run, such as release")
    node.add_argument("--run", required=True, metavar="DIR", help=RUN)

    supervise = command(
        commands, "supervise", "launch.chain:supervise_detached",
        "Run what a run folder's plan selects; `submit` starts this in the background.",
        "mvl supervise runs/demo --lock 3 --grace 15", hidden=True,
    )  # fmt: skip
    supervise.add_argument("run", metavar="RUN", help=RUN)
    supervise.add_argument(
        "--lock", type=int, required=True, help="inherited file of the run's lock"
    )
    supervise.add_argument(
        "--grace", type=float, required=True, help="seconds from SIGTERM to kill"
    )


def _add_job_commands(commands: Any, command: _Command) -> None:
    begin = command(
        commands, "job-begin", "launch.slurm.job:begin", "Open an attempt; job scripts call this.",
        "mvl job-begin runs/demo stage0", hidden=True,
    )  # fmt: skip
    end = command(
        commands, "job-end", "launch.slurm.job:end", "Close an attempt; job scripts call this.",
        "mvl job-end runs/demo stage0 1", hidden=True,
    )  # fmt: skip
    for parser in (begin, end):
        parser.add_argument("run", metavar="RUN", help=RUN)
        parser.add_argument("stage", metavar="STAGE", help="a stage, such as stage0")
    end.add_argument("attempt", metavar="N", type=int, help="the attempt")
    end.add_argument("--warned", default="", help="not empty when the time limit's warning came")
    end.add_argument("--asked", default="", help="not empty when the job was asked to stop")
    end.add_argument("--hung", default="", help="not empty when ranks did not heed the warning")
    end.add_argument("--slurm", default="", help="what `scontrol show job` says")


def _add_doctor(commands: Any, command: _Command) -> None:
    doctor = command(
        commands, "doctor", "launch.doctor:main", "Say what this machine has and lacks.",
        "mvl doctor --quick",
    )  # fmt: skip
    doctor.add_argument("--quick", action="store_true", help="leave out the all-reduce")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    command(
        commands, "doctor-rank", "launch.doctor:rank", "One rank of `mvl doctor`.",
        "mvl doctor-rank", hidden=True,
    )  # fmt: skip
    node = command(
        commands, "doctor-node", "launch.slurm.examine:main",
        "Look at a job's node; job scripts call this.", "mvl doctor-node DIR --gpus 8", hidden=True,
    )  # fmt: skip
    node.add_argument("folder", metavar="DIR", help="where what is found is written")
    node.add_argument("--gpus", type=int, default=0, help="GPUs to expect")
    node.add_argument("--least-disk-gb", type=float, default=0.0, help="space to expect")
    node.add_argument("--all-reduce", action="store_true", help="measure it over the job's places")
    node.add_argument("--least-gb-s", type=float, default=0.0, help="its slowest rate")


def _recipe_arguments(parser: Any, override_arguments: Callable[[Any], None]) -> None:
    parser.add_argument(
        "recipe", metavar="STAGES", help="a recipe folder or one of its stage files"
    )
    parser.add_argument("--site", default="local", help="a file of slurm/sites; default: local")
    parser.add_argument("--from", dest="first", metavar="S", help="the first stage to run")
    parser.add_argument("--until", dest="last", metavar="S", help="the last stage to run")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="S", help="leave a stage out; repeatable"
    )
    override_arguments(parser)

"""The `mvl` command: parses the command line and hands over to the module that does the work.

Modules are imported when their command runs, so that a login node without torch can plan, submit
and watch, and `mvl status` answers at once. Errors that a user can mend are printed as one message
without a traceback (MVL_TRACEBACK=1 shows it); exit codes are in docs/exit_codes.md.
"""

import argparse
import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from launch import exit_codes
from launch.checkpoint_commands import add_commands as add_checkpoint_commands
from launch.data_arguments import add_data_commands
from launch.infer_arguments import add_commands as add_infer_commands
from launch.parser import Parser
from launch.run_arguments import RUN as _RUN
from launch.run_arguments import add_run_commands

_WORKERS = (
    "train", "node", "check-rank", "doctor-rank", "doctor-node", "supervise", "job-begin", "job-end"
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE = "a stage file, such as stages/laptop/stage0.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # A service manager may have started us with SIGTERM blocked, and ranks inherit that: `mvl
    # cancel` and the end of a supervisor would then go unheard.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    args = parse(argv)
    module, _, function = args.handler.partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(args))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        if args.command in _WORKERS:
            raise  # the pipe was one of its own, and its work is not finished
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK
    except Exception as error:
        code = _code_of(error, args.command)
        if code == exit_codes.ERROR or os.environ.get("MVL_TRACEBACK") == "1":
            raise
        print(f"mvl {args.command}: {_message(error, args)}", file=sys.stderr)
        return code


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; `key=value` overrides may stand anywhere after the command.

    argparse gives positional arguments behind an option to nobody, so they are collected here.
    """
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(exit_codes.USAGE)
    args, rest = parser.parse_known_args(argv)
    if rest:
        strangers = [word for word in rest if "=" not in word or word.startswith("-")]
        if strangers or not hasattr(args, "overrides"):
            args.parser.refuse_unknown(strangers or rest)
        args.overrides = [*args.overrides, *rest]
    return args


def _code_of(error: Exception, command: str) -> int:
    """The exit code of an error a user can mend; ERROR for a defect, which keeps its traceback."""
    from launch.lock import BusyError
    from megatron_vl.run.folder import ParentError, RunError
    from megatron_vl.run.receipt import ReceiptError

    if isinstance(error, ParentError):
        return exit_codes.HELD
    if isinstance(error, BusyError):
        return exit_codes.BUSY
    if isinstance(error, RunError | ReceiptError):
        return exit_codes.USAGE
    is_config_error = type(error).__module__ == "megatron_vl.config.errors"
    # Inside a rank's arithmetic a ValueError is a defect whose traceback belongs in the log.
    is_users = isinstance(error, ValueError) or (isinstance(error, OSError) and _of_a_file(error))
    is_users = is_users and command != "train"
    return exit_codes.USAGE if is_config_error or is_users else exit_codes.ERROR


def _of_a_file(error: OSError) -> bool:
    """Whether an OSError is about a file that the user named or may not touch, or about room."""
    named = error.filename is not None or isinstance(error, FileNotFoundError)
    return named or error.errno in _NO_ROOM


def _message(error: Exception, args: argparse.Namespace) -> str:
    """An error as a person reads it; the system's own name the file first and need no number."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        place = error.filename or getattr(args, "run", None) or getattr(args, "out", None) or "."
        return (
            f"{place}: {error.strerror}; make room (`df -h {shlex.quote(str(place))}`), then give "
            "the command again: what is unfinished is not used"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = Parser(
        prog="mvl",
        description="Train, launch and release hybrid vision-language models in stages.",
        epilog="example:\n  mvl plan stages/laptop\n"
        "  mvl submit stages/laptop --run runs/demo --follow\n  mvl report runs/demo\n\n"
        "`mvl COMMAND --help` says more; the exit codes are in docs/exit_codes.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_run_commands(commands, _command, _override_arguments)
    _add_check_commands(commands)
    _add_watch_commands(commands)
    _add_config_commands(commands)
    _add_model_commands(commands)
    _add_checkpoint_commands(commands)
    return parser


def _add_check_commands(commands: Any) -> None:
    check = _command(
        commands, "check", "launch.check:main", "Compare a layout with one rank, layer by layer.",
        "mvl check stages/laptop/stage1.yaml parallel.tensor=2 parallel.context=2 parallel.data=1",
    )  # fmt: skip
    check.add_argument("file", metavar="FILE", help=_FILE)
    check.add_argument(
        "--layers", type=int, default=0, metavar="N",
        help="decoder layers to keep; default: until each kind of the pattern has come once",
    )  # fmt: skip
    check.add_argument("--encoder-layers", type=int, default=2, metavar="N", help="default: 2")
    check.add_argument("--all", action="store_true", help="list every gradient, not the worst")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    _override_arguments(check)
    rank = _command(
        commands, "check-rank", "launch.check:rank", "One rank of `mvl check`.",
        "mvl check-rank FILE --record DIR", hidden=True,
    )  # fmt: skip
    rank.add_argument("file", metavar="FILE", help=_FILE)
    rank.add_argument("--record", required=True, metavar="DIR", help="where the record goes")


def _add_watch_commands(commands: Any) -> None:
    status = _command(
        commands, "status", "launch.status:main", "Show how runs, or a run's stages, stand.",
        "mvl status runs/demo",
    )  # fmt: skip
    status.add_argument(
        "run", nargs="?", default="runs", metavar="RUN",
        help="a run folder, or a folder of runs; default: runs",
    )  # fmt: skip
    status.add_argument("--json", action="store_true", help="print one JSON value")
    status.add_argument(
        "--watch", nargs="?", type=float, const=2.0, metavar="S",
        help="look again every S seconds until nothing runs; default: 2",
    )  # fmt: skip

    logs = _command(
        commands, "logs", "launch.logs:main", "Print what a stage printed.",
        "mvl logs runs/demo stage0 -f",
    )  # fmt: skip
    logs.add_argument("run", metavar="RUN", help=_RUN)
    logs.add_argument("stage", metavar="STAGE", help="a stage, such as stage0")
    logs.add_argument("-f", "--follow", action="store_true", help="go on while the run is running")
    logs.add_argument("--attempt", type=int, metavar="N", help="default: the latest")
    logs.add_argument("--rank", type=int, default=0, metavar="R", help="default: 0")

    report = _command(
        commands, "report", "launch.report:main", "Write RUN/report.html, one self-contained page.",
        "mvl report runs/demo",
    )  # fmt: skip
    report.add_argument("run", metavar="RUN", help=_RUN)


def _add_config_commands(commands: Any) -> None:
    config = commands.add_parser("config", help="Look at stage files.")
    inside = config.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    show = _command(
        inside, "show", "launch.config_commands:show", "Print a stage with everything resolved.",
        "mvl config show stages/laptop/stage0.yaml optimizer.lr=1e-3",
    )  # fmt: skip
    show.add_argument("file", metavar="FILE", help=_FILE)
    show.add_argument("--origins", action="store_true", help="say which file and line set each key")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    _override_arguments(show)
    explain = _command(
        inside, "explain", "launch.config_commands:explain_key", "Say what a key means and is.",
        "mvl config explain stages/laptop/stage0.yaml optimizer.lr",
    )  # fmt: skip
    explain.add_argument("file", metavar="FILE", help=_FILE)
    explain.add_argument("key", metavar="KEY", help="a key or a section, such as optimizer.lr")
    _override_arguments(explain)
    diff = _command(
        inside, "diff", "launch.config_commands:diff", "List the keys in which two stages differ.",
        "mvl config diff stages/laptop/stage0.yaml stages/laptop/stage1.yaml",
    )  # fmt: skip
    diff.add_argument("a", metavar="A", help=_FILE)
    diff.add_argument("b", metavar="B", help="the stage file to compare it with")
    diff.add_argument(
        "--but-sizes", action="store_true", help="leave out what a recipe's size may change"
    )
    diff.add_argument("--json", action="store_true", help="print one JSON list")
    schema = _command(
        inside, "schema", "launch.config_commands:schema", "List every key a stage file may hold.",
        "mvl config schema",
    )  # fmt: skip
    other = schema.add_mutually_exclusive_group()
    other.add_argument("--site", action="store_true", help="those of a site file instead")
    schema.add_argument("--json", action="store_true", help="as a JSON schema, for editors")
    other.add_argument(
        "--node", choices=("assemble", "evaluate", "release"), help="those of a node's file instead"
    )


def _add_model_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="Make the data a recipe reads, and look at it.")
    inside = data.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    add_data_commands(inside, _command, _override_arguments)

    add_infer_commands(commands, _command)


def _add_checkpoint_commands(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="Convert, explain and compare checkpoints.")
    inside = checkpoint.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    add_checkpoint_commands(inside, _command)


def _command(
    commands: Any, name: str, handler: str, text: str, example: str, *, hidden: bool = False
) -> Any:
    """Add a command; `handler` is `module:function`, imported when the command runs.

    A hidden one is for `mvl` itself and not listed.
    """
    parser = commands.add_parser(
        name,
        **({} if hidden else {"help": text}),
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.hidden = hidden
    parser.set_defaults(handler=handler, parser=parser)
    return parser


def _override_arguments(parser: Any) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set keys of every stage, as in a=1 b=2"
    )


if __name__ == "__main__":
    sys.exit(main())

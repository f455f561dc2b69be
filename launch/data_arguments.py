"""The command line of `mvl data`; imports nothing heavy."""

import argparse
from collections.abc import Callable
from typing import Any

FORMATS = (
    "nemotron-v2",
    "nemotron-v1",
    "llava",
    "sharegpt",
    "messages",
    "openai",
    "hf-parquet",
)
"""The formats of `megatron_vl.data.convert.formats`, which a test holds this to."""

Command = Callable[..., Any]

_SOURCE = "a prepared source, or a folder of them, such as data/laptop"


def add_data_commands(inside: Any, command: Command, overrides: Callable[[Any], None]) -> None:
    """Add every `mvl data` command.

    Args:
        command: adds one command, as `cli._command`.
        overrides: adds `key=value` arguments.
    """
    prepare = command(
        inside, "prepare", "launch.data_commands:prepare",
        "Build the data sets of a recipe, or index a folder of shards.",
        "mvl data prepare stages/laptop",
    )  # fmt: skip
    prepare.add_argument(
        "recipe", metavar="STAGES_OR_DIR",
        help="a recipe folder, a stage file, or a folder of train-*.tar and val-*.tar",
    )  # fmt: skip
    prepare.add_argument("--force", action="store_true", help="build again what is there already")
    _workers(prepare, " that read shards")
    overrides(prepare)
    _add_convert(inside, command)
    _add_looks(inside, command, overrides)


def _add_convert(inside: Any, command: Command) -> None:
    convert = command(
        inside, "convert", "launch.data_commands:convert",
        "Turn a public vision-language set into a source the loader reads.",
        "mvl data convert --from llava sets/llava/train.json --media-root sets/llava/images "
        "--out data/mine/llava --skip-missing",
    )  # fmt: skip
    convert.add_argument("--from", dest="format", required=True, choices=FORMATS, metavar="FORMAT",
                         help=f"the source's format: {', '.join(FORMATS)}")  # fmt: skip
    convert.add_argument("source", metavar="SRC", help="a file of rows, or the folder it is in")
    convert.add_argument(
        "--out", required=True, metavar="DIR", help="the source to make; its name is the folder's"
    )
    convert.add_argument(
        "--media-root", metavar="DIR",
        help="where rows' media are, as files or in tars; default: beside the rows",
    )  # fmt: skip
    convert.add_argument(
        "--shard-size", type=size_in_bytes, default=size_in_bytes("2GB"), metavar="SIZE",
        help="largest shard, such as 500MB; default: 2GB",
    )  # fmt: skip
    _workers(convert)
    convert.add_argument(
        "--limit", type=int, default=0, metavar="N", help="read N rows at most; default: all"
    )
    convert.add_argument(
        "--fraction", type=float, default=1.0, metavar="F",
        help="take this part of the rows, by hash: 0.1 is part of 0.2; default: 1",
    )  # fmt: skip
    convert.add_argument(
        "--held-out", type=float, default=0.01, metavar="F",
        help="keep this part for validation, by hash of what it shows; default: 0.01",
    )  # fmt: skip
    convert.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="of both hashes; default: 1234"
    )
    faults = convert.add_mutually_exclusive_group()
    faults.add_argument(
        "--skip-missing", action="store_true",
        help="leave rows with faults out, and report each",
    )  # fmt: skip
    faults.add_argument(
        "--strict", action="store_true", help="stop at the first row with a fault; the default"
    )
    convert.add_argument("--resume", action="store_true", help="go on with an unfinished one")
    convert.add_argument("--json", action="store_true", help="print the report as one JSON object")


def _add_looks(inside: Any, command: Command, overrides: Callable[[Any], None]) -> None:
    inspect = command(
        inside, "inspect", "launch.data_commands:inspect",
        "Render samples as a page: images in their tiles, tokens, what is trained on.",
        "mvl data inspect data/laptop/qa --stage stages/laptop/stage1.yaml -n 5 --out qa.html",
    )  # fmt: skip
    inspect.add_argument("data", metavar="DIR", help=_SOURCE)
    inspect.add_argument("-n", "--count", type=int, default=5, metavar="N",
                         help="samples of each source; default: 5")  # fmt: skip
    inspect.add_argument("--key", action="append", default=[], metavar="KEY",
                         help="show this sample; repeatable")  # fmt: skip
    inspect.add_argument(
        "--out", default="inspect.html", metavar="FILE", help="default: inspect.html"
    )
    _view(inspect)

    stats = command(
        inside, "stats", "launch.data_commands:stats",
        "Count samples, tokens and tiles; shares of sources; what is cut or dropped.",
        "mvl data stats stages/laptop/stage1.yaml",
    )  # fmt: skip
    stats.add_argument("data", metavar="DIR_OR_STAGE", help=f"{_SOURCE}; or a stage file")
    stats.add_argument("--json", action="store_true", help="print one JSON object")
    _view(stats)
    _workers(stats)
    overrides(stats)

    validate = command(
        inside, "validate", "launch.data_commands:validate",
        "Check every row and medium of a source; ends with 7 when something is wrong.",
        "mvl data validate data/laptop/qa --decode-all",
    )  # fmt: skip
    validate.add_argument("data", metavar="DIR", help=_SOURCE)
    validate.add_argument(
        "--decode-all", action="store_true", help="decode every image and video, not just headers"
    )
    validate.add_argument("--json", action="store_true", help="print one JSON object")
    _workers(validate)

    bench = command(
        inside, "bench", "launch.data_commands:bench",
        "Measure how fast samples and packs come, and where the time goes.",
        "mvl data bench stages/laptop/stage1.yaml --seconds 5",
    )  # fmt: skip
    bench.add_argument("data", metavar="DIR_OR_STAGE", help=f"{_SOURCE}; or a stage file")
    bench.add_argument(
        "--seconds", type=float, default=10.0, metavar="T", help="for each part; default: 10"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    _view(bench)
    overrides(bench)

    ledger = command(
        inside, "ledger", "launch.ledger:main",
        "List the samples a stage has trained on, a line of JSON each.",
        "mvl data ledger runs/demo stage1 --step 3",
    )  # fmt: skip
    ledger.add_argument("run", metavar="RUN", help="a run folder, such as runs/demo")
    ledger.add_argument("stage", metavar="STAGE", help="a stage, such as stage1")
    ledger.add_argument("--step", type=int, metavar="N", help="this step alone; default: all")

    show = command(
        inside, "show", "launch.ledger:show",
        "Render the packs of one step as a page, to see what a spike was.",
        "mvl data show runs/demo stage1 --step 17 --out step.html",
    )  # fmt: skip
    show.add_argument("run", metavar="RUN", help="a run folder, such as runs/demo")
    show.add_argument(
        "stage", metavar="STAGE", nargs="?", help="a stage; default: the last that has trained"
    )
    show.add_argument("--step", type=int, required=True, metavar="N", help="a step of it, from 1")
    show.add_argument("--out", default="step.html", metavar="FILE", help="default: step.html")


def _workers(parser: Any, doing: str = "") -> None:
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help=f"processes{doing}; default: 1"
    )


def _view(parser: Any) -> None:
    """How samples are to be seen: a stage's sizes, or the published ones with a tokenizer."""
    parser.add_argument(
        "--stage", metavar="FILE", help="a stage file for sizes and tokenizer of a DIR"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE",
        help="a tokenizer.json; default: the one beside the data",
    )  # fmt: skip


def size_in_bytes(text: str) -> int:
    """A size such as 2GB or 500MB (powers of 1000), or a plain number of bytes.

    Raises:
        argparse.ArgumentTypeError: no size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    number, factor = text.strip().upper(), 1
    for unit, value in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), value
            break
    try:
        size = int(float(number) * factor)
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 500MB or 2GB")
    return size

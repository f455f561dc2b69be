"""`mvl generate` and `mvl evaluate`: their arguments, declared without torch."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from megatron_vl.run.result_files import READERS

_MODEL = "a run, a stage folder, a checkpoint, or an exported folder"


def add_commands(commands: Any, command: Callable[..., Any]) -> None:
    """Declare both.

    Args:
        commands: the subparsers of `mvl`.
        command: adds one: (commands, name, handler, text, example).
    """
    _add_generate(commands, command)
    _add_evaluate(commands, command)


def _add_generate(commands: Any, command: Callable[..., Any]) -> None:
    generate = command(
        commands, "generate", "launch.infer_commands:generate", "Ask a trained model.",
        "mvl generate runs/demo --image picture.png --prompt 'What is this?'\n"
        "  mvl generate releases/demo/bf16 --video clip.mp4 --evs-rate 0.75 --prompt 'What is it?'",
    )  # fmt: skip
    generate.add_argument("checkpoint", metavar="CKPT_OR_EXPORT", help=_MODEL)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="P", help="what to ask")
    asked.add_argument("--held-out", metavar="SOURCE", help="ask held-out samples of this source")
    generate.add_argument("--count", type=int, default=4, metavar="N", help="samples of --held-out")
    generate.add_argument("--system", metavar="TEXT", help="what the system turn says")
    for kind, text in (
        ("image", "a picture the prompt is about"),
        ("video", "a video it is about"),
        ("pdf", "a document it is about, page by page"),
    ):
        generate.add_argument(
            f"--{kind}", dest="shown", action="append", type=_shown(kind), metavar="F",
            help=text + "; repeatable, shown in the order given",
        )  # fmt: skip
    generate.add_argument(
        "--pages", type=page_range, metavar="A-B", help="pages of the PDF, from 1; default: all"
    )
    generate.add_argument(
        "--evs-rate", type=float, metavar="R",
        help="part of a video's embeddings to prune, in [0, 1); default: the stage's lowest",
    )  # fmt: skip
    generate.add_argument("--tools", metavar="F", help="JSON list of functions it may call")
    generate.add_argument(
        "--reasoning", choices=("on", "off"), default="off", help="think first; default: off"
    )
    generate.add_argument(
        "--reasoning-budget", type=int, metavar="N",
        help="tokens to think: ended at the next line end, by force 500 tokens later",
    )  # fmt: skip
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer; default: 128"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the likeliest token (default); published with reasoning: 0.6",
    )  # fmt: skip
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="default: 1; published: 0.95"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all")
    generate.add_argument("--seed", type=int, default=1234, metavar="N", help="default: 1234")
    _like_argument(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object an answer")


def _add_evaluate(commands: Any, command: Callable[..., Any]) -> None:
    evaluate = command(
        commands, "evaluate", "launch.infer_commands:evaluate",
        "Measure a model on held-out data, or read other tools' results.",
        "mvl evaluate runs/demo qa image_swap --out metrics.json\n"
        "  mvl evaluate --results outputs/vlmevalkit --out metrics.json",
    )  # fmt: skip
    evaluate.add_argument("checkpoint", nargs="?", metavar="CKPT_OR_EXPORT", help=_MODEL)
    evaluate.add_argument(
        "suites", nargs="*", metavar="SUITE",
        help="a source of the data (qa, ocr, ...), image_swap, frame_shuffle; default: all",
    )  # fmt: skip
    evaluate.add_argument("--out", required=True, metavar="F", help="the metrics, one JSON object")
    evaluate.add_argument(
        "--limit", type=int, default=16, metavar="N",
        help="held-out samples of a source; default: 16",
    )  # fmt: skip
    evaluate.add_argument(
        "--results", action="append", default=[], metavar="F",
        help="read results of another tool, a file or a folder of them; repeatable",
    )  # fmt: skip
    evaluate.add_argument(
        "--reader", choices=READERS, metavar="KIND",
        help=f"whose results: {', '.join(READERS)}; default: told from the files",
    )  # fmt: skip
    evaluate.add_argument(
        "--command", dest="external", metavar="CMD",
        help="measure with a command instead: {checkpoint} and {results} in its words become the "
        "model and the place for what it writes",
    )  # fmt: skip
    evaluate.add_argument(
        "--timeout", type=float, default=86400.0, metavar="S",
        help="seconds --command may take; default: 86400",
    )  # fmt: skip
    _like_argument(evaluate)


def _like_argument(parser: Any) -> None:
    parser.add_argument(
        "--like", metavar="FILE",
        help="stage file whose data an exported folder is asked about; its model must be the same",
    )  # fmt: skip


def _shown(kind: str) -> Callable[[str], tuple[str, str]]:
    return lambda file: (kind, file)


def page_range(text: str) -> tuple[int, int]:
    """First and last page of 3 or 2-5."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no page range; write it as 3 or 2-5")
    return int(found[1]), int(found[2] or found[1])

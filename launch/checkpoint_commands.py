"""`mvl checkpoint`: convert checkpoints to and from published folders, explain and compare them.

The arguments are declared here without torch; what they start is imported when it runs.
"""

import argparse
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import exit_codes

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CHECKPOINT = "a run, a stage folder of one, or a checkpoint"
_SHARDS = "as in 500MB; default: 4GB"


def add_commands(inside: Any, command: Callable[..., Any]) -> None:
    """Declare the subcommands.

    Args:
        inside: the subparsers of `mvl checkpoint`.
        command: adds one: (inside, name, handler, text, example).
    """
    here = "launch.checkpoint_commands:"
    export = command(
        inside, "export", here + "export", "Write a checkpoint as a Hugging Face folder.",
        "mvl checkpoint export runs/demo releases/demo --format bf16",
    )  # fmt: skip
    export.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT)
    export.add_argument("out", metavar="OUT", help="the folder to make")
    export.add_argument(
        "--format", choices=("bf16", "fp32", "fp8", "nvfp4"), default="bf16",
        help="type of the weights; default: bf16, which rounds a float32 checkpoint",
    )  # fmt: skip
    export.add_argument("--shard-size", type=size, default="4GB", metavar="N", help=_SHARDS)
    export.add_argument(
        "--keep-padding", action="store_true", help="publish the vocabulary's padding rows too"
    )
    export.add_argument("--tokenizer", metavar="F", help="tokenizer.json; default: the data's")
    export.add_argument(
        "--amax", metavar="F", help="calibrated inputs (amax.safetensors), for fp8 and nvfp4"
    )
    _add_layout(export)
    export.add_argument(
        "--no-verify", action="store_true", help="do not compare the checkpoint with its receipt"
    )
    bring = command(
        inside, "import", here + "import_folder", "Make a stage folder of a Hugging Face folder.",
        "mvl checkpoint import releases/demo/bf16 runs/tuned/stages/00_init --like "
        "stages/laptop/stage0.yaml",
    )  # fmt: skip
    bring.add_argument("folder", metavar="HF", help="a folder of NemotronH_Nano_VL_V2")
    bring.add_argument("out", metavar="OUT", help="the stage folder to make")
    bring.add_argument("--like", metavar="F", help="the stage file it shall be; its model must fit")
    bring.add_argument(
        "--seed", type=int, default=1234, metavar="N",
        help="of vocabulary rows that a larger model adds; default: 1234",
    )  # fmt: skip
    assemble = command(
        inside, "assemble", here + "assemble",
        "Make a starting checkpoint of a released decoder and a released encoder.",
        "mvl checkpoint assemble --decoder NVIDIA-Nemotron-Nano-12B-v2 --encoder C-RADIOv2-VLM-H "
        "runs/12b/stages/00_init --like stages/nano_12b_v2_vl/stage0.yaml",
    )  # fmt: skip
    assemble.add_argument("--decoder", required=True, metavar="HF", help="a nemotron_h folder")
    assemble.add_argument("--encoder", required=True, metavar="HF", help="a RADIO folder")
    assemble.add_argument("out", metavar="OUT", help="the stage folder to make")
    assemble.add_argument("--like", required=True, metavar="F", help="the stage file it shall be")
    _add_release_commands(inside, command)
    _add_looking_commands(inside, command)


def _add_release_commands(inside: Any, command: Callable[..., Any]) -> None:
    here = "launch.checkpoint_commands:"
    calibrate = command(
        inside, "calibrate", here + "calibrate",
        "Measure the largest inputs of the linears that fp8 and nvfp4 quantize.",
        "mvl checkpoint calibrate runs/demo amax.safetensors",
    )  # fmt: skip
    calibrate.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT)
    calibrate.add_argument("out", metavar="OUT", help="the file to make")
    _add_packs(calibrate)
    certify = command(
        inside, "certify", here + "certify",
        "Check a release against its checkpoint, from the files on disk and without a network.",
        "mvl checkpoint certify releases/demo --against runs/demo",
    )  # fmt: skip
    certify.add_argument("export", metavar="EXPORT", help="a folder that export made")
    certify.add_argument("--against", required=True, metavar="CKPT", help=_CHECKPOINT)
    _add_certificate_options(certify)
    release = command(
        inside, "release", here + "release",
        "Calibrate, export and certify; only what passes takes its place.",
        "mvl checkpoint release releases/demo --bf16 runs/demo --fp8 runs/demo --nvfp4 runs/demo",
    )  # fmt: skip
    release.add_argument("out", metavar="OUT", help="the folder that holds one folder a format")
    for form in ("bf16", "fp8", "nvfp4"):
        release.add_argument(f"--{form}", metavar="CKPT", help=f"released in {form}: {_CHECKPOINT}")
    _add_layout(release)
    _add_packs(release)
    release.add_argument("--shard-size", type=size, default="4GB", metavar="N", help=_SHARDS)
    _add_certificate_options(release)


def _add_packs(parser: Any) -> None:
    parser.add_argument(
        "--packs", type=int, default=32, metavar="N",
        help="packs of the stage's data that calibration looks at; default: 32",
    )  # fmt: skip


def _add_layout(parser: Any) -> None:
    parser.add_argument(
        "--layout", choices=("modelopt", "compressed_tensors"), default="modelopt",
        help="how fp8 and nvfp4 tensors are named; default: modelopt",
    )  # fmt: skip


def _add_certificate_options(parser: Any) -> None:
    parser.add_argument(
        "--bound", action="append", default=[], metavar="NAME=VALUE",
        help="a bound other than the published one, as in kl_nvfp4=0.05; the certificate lists it",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="F", help="tokenizer.json; default: the data's")


def _add_looking_commands(inside: Any, command: Callable[..., Any]) -> None:
    here = "launch.checkpoint_commands:"
    explain = command(
        inside, "explain", here + "explain", "Say who made a checkpoint, from what, what it holds.",
        "mvl checkpoint explain runs/demo",
    )  # fmt: skip
    explain.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT + ", or a published folder")
    explain.add_argument(
        "--verify", action="store_true", help="read all weights and compare digest or hashes"
    )
    explain.add_argument("--json", action="store_true", help="print one JSON object")
    diff = command(
        inside, "diff", here + "diff", "Compare config, data and weights, module by module.",
        "mvl checkpoint diff runs/demo/stages/01_stage0 runs/demo/stages/02_stage1",
    )  # fmt: skip
    diff.add_argument("a", metavar="A", help=_CHECKPOINT + ", or a published folder")
    diff.add_argument("b", metavar="B", help="what it is compared with")
    diff.add_argument("--json", action="store_true", help="print one JSON object")


def size(text: str) -> int:
    """Bytes of a size such as 500MB."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?B?)", text.strip().upper())
    unit = found[2] if found else ""
    unit += "" if unit.endswith("B") or not unit else "B"
    if not found or unit not in _SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 500MB or 4GB")
    value = int(float(found[1]) * _SIZES[unit])
    if value < 1:
        raise argparse.ArgumentTypeError(f"a shard of {text!r} holds nothing; the least is 1")
    return value


def _say(progress: Any) -> None:
    """One line a report; on a terminal it stays on one line."""
    if sys.stderr.isatty():
        print(f"\r{progress}\033[K", end="", file=sys.stderr, flush=True)
    else:
        print(progress, file=sys.stderr, flush=True)


def export(args: Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from checkpoint_tools.export_hf import ExportOptions
    from checkpoint_tools.export_hf import export as write

    options = ExportOptions(
        format=args.format,
        shard_bytes=args.shard_size,
        keep_padding=args.keep_padding,
        check_digest=not args.no_verify,
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        layout=args.layout,
        amax=Path(args.amax) if args.amax else None,
    )
    write(Path(args.checkpoint), Path(args.out), options, _say)
    return _made(args.out)


def calibrate(args: Namespace) -> int:
    """Write the amax file of a checkpoint."""
    from checkpoint_tools.calibrate import calibrate as measure

    made = measure(Path(args.checkpoint), Path(args.out), _say, args.packs)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"wrote {args.out}: {made.packs} packs, {made.tokens:,} tokens, of {made.digest[:12]}")
    return exit_codes.OK


def certify(args: Namespace) -> int:
    """Write a release's certificate; FOUND where a check fails."""
    from checkpoint_tools.certificate.check import Bounds
    from checkpoint_tools.certificate.run import certify as look
    from checkpoint_tools.certificate.run import failures

    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    bounds = Bounds.parse(args.bound)
    made = look(Path(args.export), Path(args.against), _line, bounds, tokenizer)
    print(f"wrote {args.export}/certificate.json and certificate.html")
    return _verdict({args.export: failures(made)})


def release(args: Namespace) -> int:
    """Make certified releases; FOUND where one's certificate fails."""
    from checkpoint_tools.certificate.check import Bounds
    from checkpoint_tools.release import RELEASED, ReleaseOptions
    from checkpoint_tools.release import release as make

    checkpoints = {form: Path(path) for form in RELEASED if (path := getattr(args, form))}
    options = ReleaseOptions(
        layout=args.layout,
        bounds=Bounds.parse(args.bound),
        packs=args.packs,
        shard_bytes=args.shard_size,
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
    )
    return _verdict(make(Path(args.out), checkpoints, options, _line))


def _verdict(failed: dict[str, list[str]]) -> int:
    """Say what passed and every check that did not."""
    for name, lines in failed.items():
        print(f"{name}: {'FAILED' if lines else 'certified'}")
        for line in lines:
            print(f"  {line}")
    return exit_codes.FOUND if any(failed.values()) else exit_codes.OK


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def import_folder(args: Namespace) -> int:
    """Make a stage folder of a published folder."""
    from checkpoint_tools.import_hf import import_folder as write

    like = stage_file(args.like) if args.like else None
    write(Path(args.folder), Path(args.out), like, args.seed, _say)
    return _made(args.out)


def assemble(args: Namespace) -> int:
    """Make a stage folder of a decoder and an encoder."""
    from checkpoint_tools.assemble import assemble as write

    like = stage_file(args.like)
    write(Path(args.decoder), Path(args.encoder), Path(args.out), like, _say)
    return _made(args.out)


def stage_file(name: str) -> Path:
    """The file of --like.

    Raises:
        ConfigError: it is no file of a recipe, or a node's and not a training stage's.
    """
    from megatron_vl.config.errors import ConfigError
    from megatron_vl.config.load_node import load_node, node_kind

    path = Path(name)
    kind = node_kind(path)
    if kind is None:
        return path
    stage = getattr(load_node(path), "like", None)
    nearest = f"; it is made like {path.with_name(stage + path.suffix)}" if stage else ""
    raise ConfigError(f"--like {name} is a node ({kind.value}) and no training stage{nearest}")


def _made(out: str) -> int:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"wrote {out}; `mvl checkpoint explain {out}` says what it is")
    return exit_codes.OK


def explain(args: Namespace) -> int:
    """Print what is known about a checkpoint or a published folder."""
    from checkpoint_tools.explain import explain as look
    from checkpoint_tools.explain_text import explain_text

    known = look(Path(args.checkpoint), verify=args.verify)
    print(json.dumps(known, indent=2) if args.json else explain_text(known))
    return exit_codes.OK


def diff(args: Namespace) -> int:
    """Print how two sets of weights differ."""
    from checkpoint_tools.diff import diff as compare
    from checkpoint_tools.diff import diff_text

    found = compare(Path(args.a), Path(args.b))
    print(json.dumps(asdict(found), indent=2) if args.json else diff_text(found))
    return exit_codes.OK

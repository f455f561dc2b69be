"""`mvl generate`: ask a checkpoint or a release about text, pictures, documents and videos.

Greedy unless a temperature is given. Every token after the prompt costs one token, by the cache of
keys, values and Mamba states. One process, one conversation at a time: for looking at a model, not
for serving, which belongs to vLLM and an exported folder.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_vl.data.chat import Tool, visual_parts
from megatron_vl.infer.decode import Answer, Options, respond
from megatron_vl.infer.model import OpenModel, open_model
from megatron_vl.infer.question import Question, asked, held_out
from megatron_vl.infer.sampling import Sampling
from megatron_vl.run.folder import RunFolder

__all__ = ["Question", "answer", "asked", "held_out", "main", "open_model"]

Opener = Callable[[Path], AbstractContextManager[OpenModel]]


def answer(
    model: OpenModel,
    question: Question,
    *,
    reasoning: bool,
    max_new_tokens: int,
    say: Callable[[str], None] | None = None,
) -> str:
    """Greedy answer to one question, without special tokens; see `respond` for all options.

    Raises:
        ValueError: the prompt leaves no room for an answer.
    """
    options = Options(max_new_tokens=max_new_tokens, reasoning=reasoning)
    return respond(model, question, options, say).text


def main(args: Namespace, opener: Opener = open_model) -> int:
    """Answer the question on the command line, or held-out ones; a run keeps what was said.

    Args:
        opener: opens what the command line names.
    """
    options = _options(args)
    if args.held_out:
        _check_held_out(args)
    # Before the model, which may take minutes to open: a wrong file is told at once.
    own = None if args.held_out else _question(args)
    path = Path(args.checkpoint)
    with opener(path) as model:
        print(f"opened {model.origin}", file=sys.stderr, flush=True)
        questions = (
            held_out(model, args.held_out, args.count, evs_rate=args.evs_rate)
            if own is None
            else [own]
        )
        for number, question in enumerate(questions):
            said = respond(model, question, options)
            _print(question, said, as_json=args.json)
            if RunFolder(path).exists():
                name = f"{args.held_out or 'asked'}_{number}"
                _keep(RunFolder(path), question, said.text, name)
    return 0


def _options(args: Namespace) -> Options:
    reasoning = args.reasoning == "on"
    if args.reasoning_budget is not None and not reasoning:
        raise ValueError("--reasoning-budget bounds a trace, and there is none; add --reasoning on")
    return Options(
        max_new_tokens=args.max_new_tokens,
        reasoning=reasoning,
        reasoning_budget=args.reasoning_budget,
        sampling=Sampling(args.temperature, args.top_p, args.top_k, args.seed),
    )


def _question(args: Namespace) -> Question:
    return asked(
        args.prompt,
        args.shown or (),
        system=args.system,
        pages=args.pages,
        tools=_tools(args.tools),
        evs_rate=args.evs_rate,
    )


def _check_held_out(args: Namespace) -> None:
    """Raise ValueError where something is asked that only a question of one's own has."""
    own = {"shown": "--image, --video, --pdf", "system": "--system", "pages": "--pages"}
    own["tools"] = "--tools"
    given = [name for key, name in own.items() if getattr(args, key)]
    if given:
        raise ValueError(
            f"--held-out asks samples as they are; leave {', '.join(given)} out, or give --prompt"
        )
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; the least is 1")


def _tools(file: str | None) -> list[Tool]:
    """Functions from a JSON file.

    Raises:
        ValueError: it holds no list of objects.
    """
    if file is None:
        return []
    try:
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ValueError(
            f"{file} must hold a JSON list of functions, each with name, description and parameters"
        )
    return listed


def _print(question: Question, said: Answer, *, as_json: bool) -> None:
    if as_json:
        record = {
            "prompt": question.prompt,
            "answer": said.reply,
            "trace": said.trace,
            "tool_calls": said.tool_calls,
            "finish": said.finish,
            "budget_spent": said.budget_spent,
            "prompt_tokens": said.prompt_tokens,
            "tokens": said.tokens,
            "reference": question.reference,
            "prefill_seconds": round(said.prefill_seconds, 4),
            "decode_seconds": round(said.decode_seconds, 4),
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    print(f"> {question.prompt.strip()}\n{said.text}", flush=True)
    if question.reference is not None:
        print(f"(held-out answer: {question.reference})", flush=True)


def _keep(run: RunFolder, question: Question, text: str, name: str) -> None:
    """Append the answer to the run's `generate.jsonl`, its picture beside it."""
    image = None
    shown = visual_parts(question.messages)
    if shown and shown[0]["type"] == "image":
        folder = run.path / "generate"
        folder.mkdir(exist_ok=True)
        image = f"generate/{name}{_suffix(question.images)}"
        (run.path / image).write_bytes(question.images[0])
    record = {
        "image": image,
        "prompt": question.prompt,
        "answer": text,
        "reference": question.reference,
    }
    with (run.path / "generate.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _suffix(images: Sequence[bytes]) -> str:
    return ".jpg" if images[0][:2] == b"\xff\xd8" else ".png"

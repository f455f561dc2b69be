"""`mvl generate`: ask a checkpoint about text and pictures.

Greedy decoding, as the paper does with reasoning off. Every new token runs the whole sequence
again: exact and simple, and quadratic in the length of the answer, which a laptop-sized model does
not feel. Serving belongs to an exported checkpoint.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.chat import visual_parts
from megatron_vl.data.encode import encode_prompt, load_tokenizer
from megatron_vl.data.headers import image_header
from megatron_vl.data.loader import held_out_examples
from megatron_vl.infer.model import OpenModel, open_model
from megatron_vl.run.folder import RunFolder


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        messages: conversation in the internal form, ending with the user's turn.
        images: encoded images and videos, in the order of their parts.
        reference: the known answer, if the question is a held-out sample.
    """

    messages: list[dict[str, Any]]
    images: list[bytes]
    reference: str | None = None

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return text_of(self.messages[-1])


def text_of(message: dict[str, Any]) -> str:
    """The text parts of one message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def answer(
    model: OpenModel,
    question: Question,
    *,
    reasoning: bool,
    max_new_tokens: int,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Greedy answer to one question, without special tokens.

    Args:
        say: called with the whole answer so far after each token.

    Raises:
        ValueError: the prompt leaves no room for an answer.
    """
    prompt = encode_prompt(model.config, question.messages, question.images, reasoning)
    room = model.config.data.sequence_length - prompt.num_tokens
    if room <= 0:
        raise ValueError(
            f"the prompt has {prompt.num_tokens} tokens, the stage's sequence_length is "
            f"{model.config.data.sequence_length}; shorten it by {1 - room} tokens"
        )
    tokenizer = load_tokenizer(model.config)
    new: list[int] = []
    for _ in range(min(room, max_new_tokens)):
        token = int(model.last_logits(prompt, new).argmax())
        if token == tokenizer.end_of_turn_id:
            break
        new.append(token)
        say(tokenizer.decode(new, skip_special=True))
    return tokenizer.decode(new, skip_special=True)


def asked(prompt: str, image: str | None) -> Question:
    """A question from the command line.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: the file is no picture.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is None:
        return Question([{"role": "user", "content": parts}], [])
    data = Path(image).read_bytes()
    try:
        image_header(data)
    except Exception as error:
        raise ValueError(f"{image} is not a picture that can be read; use JPEG or PNG") from error
    return Question(
        [{"role": "user", "content": [{"type": "image", "image": image}, *parts]}], [data]
    )


def held_out(model: OpenModel, source: str, count: int) -> list[Question]:
    """The first held-out samples of a source, up to their first answer."""
    questions = []
    for messages, images in held_out_examples(model.config, source, count):
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        asked_messages = messages[:first]
        shown = len(visual_parts(asked_messages))
        questions.append(Question(asked_messages, images[:shown], text_of(messages[first])))
    return questions


def main(args: Namespace) -> int:
    """Answer the question on the command line, or held-out ones; a run keeps what was said."""
    path = Path(args.checkpoint)
    with open_model(path) as model:
        if args.held_out:
            questions = held_out(model, args.held_out, args.count)
        else:
            questions = [asked(args.prompt, args.image)]
        for number, question in enumerate(questions):
            text = answer(
                model,
                question,
                reasoning=args.reasoning == "on",
                max_new_tokens=args.max_new_tokens,
            )
            print(f"> {question.prompt.strip()}\n{text}", flush=True)
            if question.reference is not None:
                print(f"(held-out answer: {question.reference})", flush=True)
            if RunFolder(path).exists():
                name = f"{args.held_out or 'asked'}_{number}"
                _keep(RunFolder(path), question, text, name)
    return 0


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

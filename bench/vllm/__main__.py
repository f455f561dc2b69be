"""Asks this project and vLLM the same questions of one exported folder and prints a table.

    make certify-vllm        or        python -m bench.vllm [--keep DIR]

This project then reads vLLM's greedy answers, in float32, and says what it would have chosen at
each place and how likely it holds what vLLM chose. vLLM answers text in float32, and everything in
bfloat16, the type it serves pictures in (its encoder's output is bfloat16 whatever it is told, and
its other types then do not meet). Exit code 1 where a prompt differs, or a token of vLLM lies
further behind this project's choice than the margin of that type.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image

from bench.vllm.environment import ready_python
from bench.vllm.model import TILE, make_release
from checkpoint_tools.open_export import open_export
from megatron_vl.data.chat import render_template
from megatron_vl.data.fit import Room
from megatron_vl.data.frames import frame_numbers
from megatron_vl.data.headers import video_header
from megatron_vl.data.video import read_frames
from megatron_vl.infer.decode import prompt_of
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.question import Question, asked

NEW_TOKENS = 32
MARGINS = {"float32": 1e-3, "bfloat16": 0.3}
"""How far a greedy token of vLLM may lie behind this project's choice. [nats]"""
FPS = 8


@dataclass(frozen=True)
class Followed:
    """This project along the tokens another program chose.

    Attributes:
        prompt: its tokens.
        own: greedy choice at each place of that answer.
        logprobs: of the tokens chosen there.
        behind: how far each lies below this project's first choice. [nats]
    """

    prompt: list[int]
    own: list[int]
    logprobs: list[float]
    behind: list[float]


def questions(folder: Path) -> dict[str, Question]:
    """Text, pictures of one tile and of many, two pictures, a video, the video pruned."""
    random = np.random.default_rng(5)

    def picture(name: str, width: int, height: int) -> tuple[str, str]:
        path = folder / name
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        return "image", str(path)

    tile, wide = picture("tile.png", TILE, TILE), picture("wide.png", 150, 100)
    clip = folder / "clip.mp4"
    with av.open(clip, "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = TILE
        still = random.integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
        for number in range(6 * FPS):
            still[: number % TILE] = random.integers(0, 256, (number % TILE, TILE, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode(None))
    video = ("video", str(clip))
    return {
        "text": asked("bad cab gaffe feed the dead?"),
        "one tile": asked("bad?", [tile]),
        "tiles": asked("cab egg?", [wide]),
        "two pictures": asked("add?", [tile, wide]),
        "video": asked("hag bed?", [video], evs_rate=0.0),
        "video, EVS 0.75": asked("hag bed?", [video], evs_rate=0.75),
    }


def follow(model: OpenModel, question: Question, tokens: list[int]) -> Followed:
    """Read the question and then the tokens of an answer to it."""
    prompt = prompt_of(model, question, False)
    decoding = model.decoding(prompt.num_tokens + len(tokens))
    logits_V = decoding.prefill(prompt)
    found = Followed(prompt.tokens_L.tolist(), [], [], [])
    for token in tokens:
        logprobs_V = logits_V.log_softmax(-1)
        found.own.append(int(logprobs_V.argmax()))
        found.logprobs.append(float(logprobs_V[token]))
        found.behind.append(float(logprobs_V.max() - logprobs_V[token]))
        logits_V = decoding.push(token)
    return found


def for_vllm(
    name: str, question: Question, model: OpenModel, folder: Path, dtype: str
) -> dict[str, Any]:
    """The question as `ask.py` reads it; a video as the frames this project shows."""
    content = question.messages[0]["content"]
    record: dict[str, Any] = {
        "name": f"{name}, {dtype}",
        "question": name,
        "dtype": dtype,
        "prompt": render_template(question.messages, add_generation_prompt=True, reasoning=False),
        "images": [part["image"] for part in content if part["type"] == "image"],
        "frames": "",
        "video": {},
        "evs_rate": question.evs_rate or 0.0,
        "new_tokens": NEW_TOKENS,
    }
    if any(part["type"] == "video" for part in content):
        (data,) = question.images
        header, rules = video_header(data), Room.of(model.config).video
        numbers = frame_numbers(header, rules.fps, rules.min_frames, rules.max_frames)
        frames = np.stack(list(read_frames(data, numbers, header)))
        record["frames"] = str(folder / f"{name}.npy")
        np.save(record["frames"], frames)
        record["video"] = {
            "fps": header.fps,
            "frames_indices": list(numbers),
            "total_num_frames": header.num_frames,
            "duration": header.duration,
            "do_sample_frames": False,
        }
    return record


def ask(python: Path, release: Path, records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """vLLM's answers to questions of one type and pruning rate, from a process of its own.

    Raises:
        RuntimeError: it did not answer; with the end of what it said.
    """
    asked_file, told = folder / "questions.json", folder / "answers.json"
    asked_file.write_text(json.dumps(records))
    script = Path(__file__).with_name("ask.py")
    words = [str(python), str(script), str(release), str(asked_file), str(told)]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"vLLM did not answer:\n{done.stdout[-6000:]}")
    return dict(json.loads(told.read_text()))


def compare(record: dict[str, Any], mine: Followed, theirs: dict[str, Any], image: int) -> bool:
    """Print one row; True where nothing contradicts.

    Args:
        image: the token that stands for an embedding. Where embeddings are pruned, which frame they
            stand in is decided by the encoder, so there only their number is compared.
    """
    prompts = [mine.prompt, theirs["prompt"]]
    if record["evs_rate"]:
        prompts = [
            [*(token for token in prompt if token != image), prompt.count(image)]
            for prompt in prompts
        ]
    same = prompts[0] == prompts[1]
    equal = sum(a == b for a, b in zip(mine.own, theirs["tokens"], strict=True))
    gap = np.abs(np.array(mine.logprobs) - np.array(theirs["logprobs"]))
    behind = max(mine.behind)
    passed = same and behind < MARGINS[record["dtype"]]
    print(
        f"{record['name']:26} prompt {len(mine.prompt):4} {'equal' if same else 'DIFFERS':8}"
        f"greedy tokens equal {equal:2} of {NEW_TOKENS}, the others behind by at most {behind:.1e}"
        f"   log-probability off by {gap.mean():.1e}, at most {gap.max():.1e}"
        + ("" if passed else "   FAILED"),
        flush=True,
    )
    return passed


def main() -> int:
    """Make what is missing, ask both, compare."""
    parser = argparse.ArgumentParser(prog="bench.vllm")
    parser.add_argument("--keep", type=Path, help="folder for the release and the answers")
    args = parser.parse_args()
    python = ready_python()
    with TemporaryDirectory(prefix="mvl-vllm-") as made:
        folder = args.keep or Path(made)
        release = make_release(folder / "model")
        with open_export(release) as model:
            all_questions = questions(folder)
            parameters = sum(p.numel() for p in model.module.parameters())
            print(f"{parameters / 1e6:.1f} M parameters; {model.origin.split(': ')[1]}")
            records = [
                for_vllm(name, question, model, folder, dtype)
                for name, question in all_questions.items()
                for dtype in MARGINS
                if dtype == "bfloat16" or not question.images
            ]
            theirs: dict[str, Any] = {}
            for kind in dict.fromkeys((r["dtype"], r["evs_rate"]) for r in records):
                group = [r for r in records if (r["dtype"], r["evs_rate"]) == kind]
                theirs |= ask(python, release, group, folder)
            passed = []
            for record in records:
                question = all_questions[record["question"]]
                said = theirs[record["name"]]
                mine = follow(model, question, said["tokens"])
                passed.append(compare(record, mine, said, model.tokenizer.image_id))
        return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

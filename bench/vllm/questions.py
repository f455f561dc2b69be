"""What is asked of both: text, pictures, videos, with reasoning and without."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from bench.vllm.model import TILE
from megatron_vl.data.fit import Room
from megatron_vl.data.frames import frame_numbers
from megatron_vl.data.headers import video_header
from megatron_vl.data.video import read_frames
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.question import Question, asked

FPS = 8
PRUNED = 0.75


@dataclass(frozen=True)
class Case:
    """A question by name.

    Attributes:
        reasoning: what the chat template is told; a message may say otherwise.
    """

    name: str
    question: Question
    reasoning: bool = False

    @property
    def visual(self) -> bool:
        """Whether it shows anything."""
        return bool(self.question.images)

    @property
    def evs_rate(self) -> float:
        """Part of a video's embeddings that is left out."""
        return self.question.evs_rate or 0.0


def cases(folder: Path) -> list[Case]:
    """All questions; their media are written into the folder."""
    random = np.random.default_rng(5)

    def picture(name: str, width: int, height: int) -> tuple[str, str]:
        path = folder / name
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        return "image", str(path)

    tile, wide = picture("tile.png", TILE, TILE), picture("wide.png", 150, 100)
    video = ("video", str(_clip(folder / "clip.mp4", random)))
    return [
        Case("text", asked("bad cab gaffe feed the dead?")),
        Case("text, reasoning", asked("bad cab gaffe feed the dead?"), reasoning=True),
        Case("text, /no_think", asked("add a bag", system="be /no_think deaf"), reasoning=True),
        Case("one tile", asked("bad?", [tile])),
        Case("tiles", asked("cab egg?", [wide])),
        Case("two pictures", asked("add?", [tile, wide])),
        Case("picture, reasoning", asked("fed egg?", [tile]), reasoning=True),
        Case("video", asked("hag bed?", [video], evs_rate=0.0)),
        Case("video, EVS", asked("hag bed?", [video], evs_rate=PRUNED)),
    ]


def _clip(path: Path, random: np.random.Generator) -> Path:
    """Six seconds in which ever more rows change."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = TILE
        still = random.integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
        for number in range(6 * FPS):
            still[: number % TILE] = random.integers(0, 256, (number % TILE, TILE, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def for_vllm(case: Case, model: OpenModel, folder: Path) -> dict[str, Any]:
    """The question as `ask.py` reads it; a video as the frames this project shows."""
    question = case.question
    parts = [
        part
        for message in question.messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    ]
    record: dict[str, Any] = {
        "name": case.name,
        "messages": question.messages,
        "reasoning": case.reasoning,
        "images": [part["image"] for part in parts if part["type"] == "image"],
        "frames": "",
        "video": {},
    }
    if any(part["type"] == "video" for part in parts):
        (data,) = question.images
        header, rules = video_header(data), Room.of(model.config).video
        numbers = frame_numbers(header, rules.fps, rules.min_frames, rules.max_frames)
        record["frames"] = str(folder / "frames.npy")
        np.save(record["frames"], np.stack(list(read_frames(data, numbers, header))))
        record["video"] = {
            "fps": header.fps,
            "frames_indices": list(numbers),
            "total_num_frames": header.num_frames,
            "duration": header.duration,
            "do_sample_frames": False,
        }
    return record

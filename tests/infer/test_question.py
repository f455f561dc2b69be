"""Pictures, pages and videos of a question, from files."""

import io
from pathlib import Path

import av
import numpy as np
import pypdfium2
import pytest
from PIL import Image

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.encode import encode_prompt
from megatron_vl.infer.pdf import LONGEST_EDGE
from megatron_vl.infer.question import asked
from megatron_vl.sequence.counts import evs_kept
from tests.conftest import LAPTOP, SmallData


@pytest.fixture(scope="module")
def stage(small_data: SmallData) -> StageConfig:
    return load_stage(LAPTOP / "stage2.yaml", [small_data.override])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, a document of three pages of different shades, a clip that changes."""
    folder = tmp_path_factory.mktemp("shown")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "red.png")
    Image.new("RGB", (128, 64), (30, 30, 200)).save(folder / "blue.jpg")
    document = pypdfium2.PdfDocument.new()
    for number, shade in enumerate((40, 120, 240)):
        page = document.new_page(300, 400 + 100 * number)
        bitmap = pypdfium2.PdfBitmap.from_pil(Image.new("RGB", (30, 40), (shade,) * 3))
        image = pypdfium2.PdfImage.new(document)
        image.set_bitmap(bitmap)
        image.set_matrix(pypdfium2.PdfMatrix().scale(300, 400 + 100 * number))
        page.insert_obj(image)
        page.gen_content()
    document.save(folder / "pages.pdf")
    pypdfium2.PdfDocument.new().save(folder / "empty.pdf")
    random = np.random.default_rng(5)
    noise = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:4000])
    with av.open(folder / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for _ in range(64):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def test_pictures_stand_before_the_prompt_in_their_order(files: Path, stage: StageConfig) -> None:
    shown = [("image", str(files / "blue.jpg")), ("image", str(files / "red.png"))]
    question = asked("Which is red?", shown, system="Be brief.")
    assert [message["role"] for message in question.messages] == ["system", "user"]
    assert [part["type"] for part in question.messages[1]["content"]] == ["image", "image", "text"]
    prompt = encode_prompt(stage, question.messages, question.images, False)
    # 2 x 1 tiles and a thumbnail, then one tile.
    assert len(prompt.grids) == 4
    blue, red = prompt.patches_PF[:64].float().mean(0), prompt.patches_PF[-64:].float().mean(0)
    assert blue[-1] > blue[0]
    assert red[0] > red[-1]


def test_pages_of_a_document_are_pictures(files: Path) -> None:
    name = str(files / "pages.pdf")
    pages = [Image.open(io.BytesIO(data)) for data in asked("?", [("pdf", name)]).images]
    assert [page.height for page in pages] == [LONGEST_EDGE] * 3
    assert [round(page.width / page.height, 2) for page in pages] == [0.75, 0.6, 0.5]
    shades = [np.asarray(page)[100, 100, 0] for page in pages]
    assert shades == [40, 120, 240]
    (second,) = asked("?", [("pdf", name)], pages=(2, 2)).images
    assert np.asarray(Image.open(io.BytesIO(second)))[100, 100, 0] == 120


@pytest.mark.parametrize("pages", [(0, 1), (2, 4), (3, 2)])
def test_pages_that_are_not_there_are_refused(files: Path, pages: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="it has pages 1-3"):
        asked("?", [("pdf", str(files / "pages.pdf"))], pages=pages)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.75, 0.9])
def test_a_video_is_pruned_at_any_rate(files: Path, stage: StageConfig, rate: float) -> None:
    question = asked("What is it?", [("video", str(files / "clip.mp4"))], evs_rate=rate)
    prompt = encode_prompt(
        stage, question.messages, question.images, False, evs_rate=question.evs_rate
    )
    frames = len(prompt.grids)
    assert frames == 16
    assert int((prompt.visual_rows_L != -1).sum()) == evs_kept(frames, 16, rate)


def test_a_rate_out_of_range_is_refused(files: Path, stage: StageConfig) -> None:
    question = asked("?", [("video", str(files / "clip.mp4"))])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        encode_prompt(stage, question.messages, question.images, False, evs_rate=1.0)


@pytest.mark.parametrize(
    ("kind", "file", "says"),
    [
        ("image", "clip.mp4", "not a picture that can be read .*; use JPEG or PNG"),
        ("video", "red.png", "not a video that can be read .*; use MP4 or WebM"),
        ("image", "pages.pdf", "not a picture .*; use --pdf for a document"),
        ("image", "cut.png", r"cut\.png is not a picture that can be read .*truncated"),
        ("pdf", "red.png", "not a PDF that can be read"),
        ("pdf", "empty.pdf", r"empty\.pdf is not a PDF that can be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(files: Path, kind: str, file: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        asked("?", [(kind, str(files / file))])
    with pytest.raises(FileNotFoundError):
        asked("?", [(kind, str(files / "absent"))])


def test_what_has_nothing_to_act_on_is_refused(files: Path) -> None:
    picture = [("image", str(files / "red.png"))]
    with pytest.raises(ValueError, match="pages were given without a pdf; add --pdf FILE"):
        asked("?", picture, pages=(1, 2))
    with pytest.raises(ValueError, match="a pruning rate was given without a video"):
        asked("?", picture, evs_rate=0.5)

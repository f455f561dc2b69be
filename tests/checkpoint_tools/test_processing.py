"""The shipped processor against training: the same pixels and the same ids."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import megatron_vl.sequence.grids
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import FrameLabels
from megatron_vl.data.chat import Visual, encode_conversation
from megatron_vl.data.frames import Clip, frame_labels
from megatron_vl.data.pack import patches_of
from megatron_vl.data.tiling import cut_tiles, decode_image
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD
from megatron_vl.sequence.grids import tile_grid
from megatron_vl.sequence.visual import PatchGrid
from tests.checkpoint_tools.conftest import Published

WORDS = ("cab bad gaffe", "a", "deaf <b> 12, facade\n\nbeach!", "head  hedge /no_think")
TILE = PatchGrid(4, 4)


@pytest.fixture(scope="module")
def config(stage_folder: Path) -> StageConfig:
    return load_stage(stage_folder / "config.yaml")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pictures() -> dict[str, Image.Image]:
    """Shapes that take other grids and other orders of the two passes, and every kind of pixel."""
    alpha = noise(70, 70, 4)
    alpha.putalpha(noise(70, 70, 5).convert("L"))
    turned = noise(80, 40, 6)
    turned.getexif()[0x0112] = 6
    return {
        "wide": noise(150, 37, 1),
        "tall": noise(33, 170, 2),
        "tile": noise(32, 32, 3),
        "tiny": noise(9, 7, 7),
        "alpha": alpha,
        "turned": turned,
        "grey": noise(64, 90, 8).convert("L"),
        "palette": noise(90, 64, 9).convert("P"),
        "deep": Image.fromarray(np.random.default_rng(10).integers(0, 65536, (50, 60), np.uint16)),
    }


@pytest.mark.parametrize("kind", pictures())
def test_tiles_are_those_of_training(processor: Any, config: StageConfig, kind: str) -> None:
    file = io.BytesIO()
    picture = pictures()[kind]
    picture.save(file, "PNG", exif=picture.getexif())
    file.seek(0)
    pixels, most = decode_image(file.getvalue()), config.data.max_tiles
    grid = tile_grid(pixels.shape[1], pixels.shape[0], tile_size=32, max_tiles=most)
    expected = cut_tiles(pixels, grid, 32)
    found = processor.image_processor.tiles(Image.open(file), most)
    assert torch.equal(found, expected)


def test_pixels_are_normalised_as_the_model_does(processor: Any) -> None:
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    patches = torch.from_numpy(patches_of(tiles.numpy(), 8)).unflatten(1, (3, -1)).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    found = processor.image_processor.normalise(tiles).double()
    given = torch.from_numpy(patches_of(found.numpy(), 8)).unflatten(1, (3, -1))  # type: ignore[arg-type]
    assert torch.allclose(given, (patches - mean) / std, atol=1e-5)


def ids(
    published: Published, messages: list[dict[str, Any]], visuals: Sequence[Visual]
) -> list[int]:
    """A conversation as training encodes it, up to the opening of an answer."""
    document = encode_conversation(
        messages,
        Tokenizer(published.tokenizer),
        visuals,
        add_generation_prompt=True,
        reasoning=False,
    )
    return document.tokens_N.tolist()


def text_of(processor: Any, messages: list[dict[str, Any]]) -> str:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False
    )


@pytest.mark.parametrize("words", WORDS)
def test_ids_of_a_conversation_with_pictures(
    processor: Any,
    published: Published,
    words: str,
) -> None:
    """A system turn, an answer in the past, two pictures of several tiles."""
    messages = [
        {"role": "system", "content": words},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]},
        {"role": "assistant", "content": f"<think>\nhe {words}\n</think>\n\n{words}"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "face"},
                {"type": "image"},
                {"type": "text", "text": words},
            ],
        },
    ]
    shown = [noise(150, 37), noise(32, 32)]
    counts = processor.image_processor(shown)["num_tiles"]
    assert counts == [5, 1]
    given = processor(images=shown, text=text_of(processor, messages), return_tensors="pt")
    expected = ids(published, messages, [(TILE,) * count for count in counts])
    assert given["input_ids"][0].tolist() == expected
    assert given["pixel_values"].shape == (6, 3, 32, 32)
    assert given["attention_mask"].shape == given["input_ids"].shape


@pytest.mark.parametrize("style", list(FrameLabels))
def test_ids_of_a_video(
    processor: Any, published: Published, style: FrameLabels, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "cab?"}]}]
    numbers, rate = (0, 7, 15), 29.97
    clip = Clip(TILE, numbers, frame_labels(numbers, rate, style), 3 * TILE.tokens)
    separator = "\n" if style is FrameLabels.newline else ""
    monkeypatch.setattr(processor, "frame_separator", separator)
    given = processor(
        videos=[[noise(50, 40, n) for n in numbers]],
        frame_numbers=[numbers],
        fps=rate,
        text=text_of(processor, messages),
        return_tensors="pt",
    )
    assert given["input_ids"][0].tolist() == ids(published, messages, [clip])
    assert given["pixel_values"].shape == (3, 3, 32, 32)


def test_a_batch_is_padded_and_pictures_stay_with_their_text(
    processor: Any,
    published: Published,
) -> None:
    first = [{"role": "user", "content": [{"type": "text", "text": "bad"}, {"type": "image"}]}]
    second = [{"role": "user", "content": "cab"}]
    texts = [text_of(processor, messages) for messages in (first, second)]
    given = processor(images=[noise(32, 32)], text=texts, return_tensors="pt")
    lengths = given["attention_mask"].sum(1).tolist()
    for row, mask, expected in zip(
        given["input_ids"],
        given["attention_mask"],
        [ids(published, first, [(TILE,)]), ids(published, second, [])],
        strict=True,
    ):
        assert row[mask.bool()].tolist() == expected
    assert lengths[0] > lengths[1]


def test_placeholders_and_pictures_must_agree(processor: Any) -> None:
    with pytest.raises(ValueError, match="more <image> than pictures"):
        processor(text="<image>")
    with pytest.raises(ValueError, match="more pictures were given than the text has <image>"):
        processor(text="cab", images=[noise(32, 32)])


def test_the_shipped_grids_need_nothing_of_this_project(release: Path) -> None:
    shipped = (release / "grids.py").read_text()
    assert shipped == Path(megatron_vl.sequence.grids.__file__).read_text()
    for path in release.glob("*.py"):
        assert "megatron" not in path.read_text().replace("megatron-core", "")

"""Text, images and videos to model inputs for NemotronH_Nano_VL_V2.

The chat template writes one `<image>` an image and one `<video>` a video; here each becomes the
tokens its tiles take:

    <img><image>...<image></img>
    Frame 1 sampled at 0.00 seconds: <img>...</img>\\nFrame 2 sampled at 0.50 seconds: ...

Frame labels, and what the assistant says after the opening of its turn, are tokenised on their own,
as they are in training.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from .image_processing import NemotronH_Nano_VL_V2_ImageProcessor

IMAGE, IMAGE_START, IMAGE_END, VIDEO = "<image>", "<img>", "</img>", "<video>"
_PLACEHOLDER = re.compile(f"({IMAGE}|{VIDEO})")
_OPENING = re.compile(r"(?<=Assistant\n<think></think>)|(?<=Assistant\n<think>\n)")


class NemotronH_Nano_VL_V2_Processor(ProcessorMixin):
    """A tokenizer and an image processor; videos are lists of frames.

    Args:
        frame_separator: what stands in front of every frame's label but the first.
    """

    def __init__(
        self,
        image_processor: NemotronH_Nano_VL_V2_ImageProcessor,
        tokenizer: Any,
        chat_template: str | None = None,
        frame_separator: str = "\n",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.frame_separator = frame_separator

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        fps: float = 2.0,
        frame_numbers: Sequence[Sequence[int]] | None = None,
        max_num_tiles: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs.

        Args:
            images: all images, in the order their `<image>` stands in the texts.
            text: one or several prompts, as the chat template writes them.
            videos: all videos, each the frames to show, in the order their `<video>` stands.
            fps: frames a second of the video files.
            frame_numbers: number of each shown frame in its file, from 0; by default 0, 1, 2, ...

        Returns:
            input_ids, attention_mask and, where there are pictures, pixel_values.

        Raises:
            ValueError: placeholders and pictures differ in number.
        """
        shown: dict[str, list[tuple[list[str], torch.Tensor]]] = {IMAGE: [], VIDEO: []}
        if images is not None:
            cut = self.image_processor.preprocess(images, max_num_tiles=max_num_tiles)
            for tiles in cut["pixel_values"].split(cut["num_tiles"]):
                shown[IMAGE].append(([self._run(len(tiles))], tiles))
        for at, video in enumerate(videos or ()):
            numbers = frame_numbers[at] if frame_numbers else range(len(video))
            tiles = self.image_processor.preprocess_frames(video)
            shown[VIDEO].append((list(self._frames(numbers, fps)), tiles))
        texts = [text] if isinstance(text, str) else list(text or [])
        pixels: list[torch.Tensor] = []
        rows = [self._encode(one, shown, pixels) for one in texts]
        left = [name for name, waiting in shown.items() if waiting]
        if left:
            raise ValueError(f"more pictures were given than the text has {left[0]}")
        inputs = dict(
            self.tokenizer.pad(
                {"input_ids": rows}, padding=len(rows) > 1, return_tensors=return_tensors
            )
        )
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        return BatchFeature(inputs)

    def _run(self, tiles: int) -> str:
        return IMAGE_START + IMAGE * (tiles * self.image_processor.tokens_per_tile) + IMAGE_END

    def _frames(self, numbers: Sequence[int], fps: float) -> Iterator[str]:
        """Labels and tokens of frames, alternating."""
        milliseconds = int(1000 / fps)
        for at, number in enumerate(numbers):
            separator = self.frame_separator if at else ""
            seconds = number * milliseconds / 1000
            yield f"{separator}Frame {at + 1} sampled at {seconds:.2f} seconds: "
            yield self._run(1)

    def _encode(
        self,
        text: str,
        shown: dict[str, list[tuple[list[str], torch.Tensor]]],
        pixels: list[torch.Tensor],
    ) -> list[int]:
        """Ids of one text; the tiles it uses are moved from `shown` to `pixels`."""
        pieces: list[str] = []
        for part in _PLACEHOLDER.split(text):
            if part not in shown:
                pieces += _OPENING.split(part)
                continue
            if not shown[part]:
                raise ValueError(f"the text has more {part} than pictures were given")
            run, tiles = shown[part].pop(0)
            pieces += run
            pixels.append(tiles)
        encoded = self.tokenizer([piece for piece in pieces if piece], add_special_tokens=False)
        return [index for ids in encoded["input_ids"] for index in ids]

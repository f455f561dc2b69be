"""How many decoder tokens pictures take.

Pixel shuffle folds 2 x 2 patches into one token (`PatchGrid.tokens`). An image stands in the text
as `<img>`, one `<image>` for every token of all its tiles, `</img>`.
"""

PIXEL_SHUFFLE = 2
"""Edge of the square of patches that becomes one token."""

TAGS_PER_IMAGE = 2
"""`<img>` and `</img>`."""


def evs_kept(num_frames: int, tokens_per_frame: int, rate: float) -> int:
    """Embeddings of a video that stay when the part `rate` of them is pruned.

    The first frame always stays whole. The product is truncated as published, in floating point: 20
    frames of 256 at 0.9 keep 511 (vLLM's evs.py and the released model's).

    Raises:
        ValueError: the rate is not in [0, 1), or there is no frame.
    """
    if not 0.0 <= rate < 1.0:
        nearest = 0.0 if not rate >= 0.0 else 0.99
        raise ValueError(
            f"the pruning rate is {rate}; it must be in [0, 1), the nearest: {nearest}"
        )
    if num_frames < 1:
        raise ValueError(f"a video has {num_frames} frames; it needs at least 1")
    total = num_frames * tokens_per_frame
    return max(tokens_per_frame, int(total * (1 - rate)))

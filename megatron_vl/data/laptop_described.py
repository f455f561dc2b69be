"""What pictures show, told in words: text that a decoder reads before it has seen a picture.

A large language model knows what a caption is, how words are spelled and what comes first in a
story long before an encoder is put in front of it. The laptop's decoder reads this instead: where a
picture of the recipe's other sources would stand, a few words for each of its visual tokens, and
behind them the same questions and answers. A projector then only has to find, for what the encoder
sees, the word that the decoder knows.

Only the released decoder is trained on it (`stages/laptop_start`); it holds no picture.
"""

from collections.abc import Callable
from random import Random

from megatron_vl.data import laptop_clips, pictures
from megatron_vl.data.laptop_material import (
    DIGIT_COUNTS,
    Asked,
    RawSample,
    caption_of,
    digit_question,
    ocr_lines,
    photo_question,
    reading_request,
    two_or_three_words,
    word_question,
)

TOKENS_OF_A_TILE = 16
NOTHING = "."
_VIEW_EDGE = 16
"""Edge of the tiles that views are drawn at, for their colours alone. [pixels]"""


def _tokens(random: Random, told: list[str], tiles: int) -> str:
    return " ".join(random.choices(told, k=TOKENS_OF_A_TILE * tiles))


def _view(random: Random, split: str) -> tuple[str, pictures.View]:
    view = pictures.draw_view(random, split, _VIEW_EDGE)
    told = [view.photograph.name] * 3 + [*view.colours, view.brightness, view.part]
    return _tokens(random, told, random.randint(1, 2)), view


def _spelled(random: Random, line: str) -> str:
    """A line letter by letter, some letters twice, with what stands around them."""
    letters = [
        letter
        for character in line
        for letter in [NOTHING if character == " " else character] * random.choice((1, 1, 2))
    ]
    around = [NOTHING] * random.randint(2, 6)
    return " ".join([*around, *letters, *around])


def _caption(random: Random, split: str) -> tuple[str, Asked]:
    shown, view = _view(random, split)
    return shown, caption_of(random, view)


def _photo(random: Random, split: str) -> tuple[str, Asked]:
    shown, view = _view(random, split)
    return shown, photo_question(random, view)


def _text(random: Random, split: str) -> tuple[str, Asked]:
    lines = ocr_lines(random, split)
    shown = " ".join(_spelled(random, line) for line in lines)
    return shown, (reading_request(random), "\n".join(lines))


def _words(random: Random, split: str) -> tuple[str, Asked]:
    chosen = two_or_three_words(random, split)
    return _spelled(random, " ".join(chosen)), word_question(random, chosen)


def _digits(random: Random, split: str) -> tuple[str, Asked]:
    found = [random.randrange(10) for _ in range(random.choice(DIGIT_COUNTS))]
    shown = " ".join(_tokens(random, [str(digit)] * 5 + [NOTHING], 1) for digit in found)
    return shown, digit_question(random, found)


def _clip(random: Random, split: str) -> tuple[str, Asked]:
    """Two shots one after the other, or one that changes its brightness."""
    first, second = random.sample(sorted({shot.name for shot in laptop_clips.SHOTS}), 2)
    count = random.randint(4, 10)
    told = [[first] if at * 2 < count else [second] for at in range(count)]
    asked = laptop_clips.order_question(random, first, second)
    if random.random() < 0.4:
        way = random.choice(("brighter", "darker"))
        dark = [[first, "dark"] if at * 2 < count else [first, "bright"] for at in range(count)]
        told = dark if way == "brighter" else dark[::-1]
        asked = (laptop_clips.BRIGHTNESS_QUESTION, way)
    frames = [
        f"Frame {at + 1} sampled at {at / 2:.2f} seconds: {' '.join(random.choices(words, k=6))}"
        for at, words in enumerate(told)
    ]
    return "\n".join(frames), asked


_KINDS: tuple[tuple[Callable[[Random, str], tuple[str, Asked]], int], ...] = (
    (_caption, 20),
    (_photo, 15),
    (_text, 30),
    (_words, 10),
    (_digits, 15),
    (_clip, 10),
)


def described(random: Random, split: str, tile_size: int) -> RawSample:
    """A question on something told in words."""
    kinds, weights = zip(*_KINDS, strict=True)
    shown, (question, answer) = random.choices(kinds, weights)[0](random, split)
    user = {"role": "user", "content": [{"type": "text", "text": f"{shown}\n{question}"}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return RawSample([user, assistant])

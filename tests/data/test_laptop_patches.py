"""Labelled tiles and pictures told in words: labels stand where the ink is, answers follow."""

from random import Random

import numpy as np
import pytest

from megatron_vl.data import pictures
from megatron_vl.data.laptop_described import described
from megatron_vl.data.laptop_patches import CHARACTERS, NAMES, draw_patches

TILE, PATCH = 64, 8


def test_letters_stand_where_they_are_drawn() -> None:
    """Blot each letter's box out: nothing but paper is left, and the boxes read as the line."""
    random = Random(5)
    for line in ("Gradient", "a_b(c)", "two words"):
        image, letters = pictures.render_letters(random, [line], TILE)
        assert "".join(letter.character for letter in letters) == line
        pixels = np.asarray(image).copy()
        paper = np.median(pixels)
        assert np.abs(pixels - paper).max() > 100
        for letter in letters:
            left, top, right, bottom = letter.box
            inside = pixels[int(top) : int(bottom) + 1, max(0, int(left) - 1) : int(right) + 2]
            if letter.character.isalnum():
                assert np.abs(inside.astype(float) - paper).max() > 60, letter
            inside[:] = paper
        assert np.abs(pixels - paper).max() < 60


def test_a_batch_is_the_seeds_and_its_labels_are_the_tiles() -> None:
    one, again = (
        draw_patches(Random(9), "train", 24, tile_size=TILE, patch_size=PATCH) for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    patches = (TILE // PATCH) ** 2
    assert one.patches_TPF.shape == (24, patches, 3 * PATCH**2)
    assert one.classes_TP2.shape == (24, patches, 2)
    letters = {NAMES.index(character) for character in CHARACTERS}
    inked, blank, uniform = [], [], 0
    for tile, classes in zip(one.patches_TPF, one.classes_TP2, strict=True):
        if len(set(classes.flatten().tolist())) == 1:
            uniform += 1
            continue
        assert set(classes.flatten().tolist()) <= letters | {0}
        spread = tile.reshape(patches, -1).astype(float).std(1)
        inked += spread[(classes > 0).all(1)].tolist()
        blank += spread[(classes == 0).all(1)].tolist()
    assert uniform > 2
    assert np.mean(inked) > 3 * np.mean(blank)


def test_the_colour_of_a_patch_is_its_pixels() -> None:
    batch = draw_patches(Random(4), "train", 16, tile_size=TILE, patch_size=PATCH)
    dark = pictures.COLOURS.index("black")
    means = batch.patches_TPF.reshape(*batch.colours_TP.shape, 3, -1).mean(-1).max(-1)
    assert means[batch.colours_TP == dark].size
    assert (means[batch.colours_TP == dark] < 70).mean() > 0.95
    assert (means[means > 120].size == 0) or (batch.colours_TP[means > 120] != dark).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_told_holds_the_answer(split: str) -> None:
    random, read = Random(3), {"digits": 0, "letters": 0}
    for _ in range(150):
        sample = described(random, split, TILE)
        assert not sample.media
        shown, _, question = sample.messages[0]["content"][0]["text"].rpartition("\n")
        answer = sample.messages[1]["content"][0]["text"]
        if question in ("Which digit?", "Which digits, from left to right?"):
            told = [word for word in shown.split() if word != "."]
            assert list(dict.fromkeys(told)) == list(dict.fromkeys(answer.split()))
            read["digits"] += 1
        elif question in ("Read the text.", "What does the image say?", "Transcribe the image."):
            told = iter(shown.replace(".", "").split())
            for letter in answer.replace(".", "").replace(" ", "").replace("\n", ""):
                assert letter in told  # consumes: the letters come in this order
            read["letters"] += 1
    assert min(read.values()) > 5

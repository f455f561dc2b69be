"""The rules of tiling and video: what breaks them, and the nearest value the message offers."""

import pytest

from tests.support.problems import problems


@pytest.mark.parametrize(
    ("overrides", "rule", "nearest"),
    [
        (["data.tiling=native"], "data.max_patches is 12288", "nearest valid: 1024"),
        (["data.tiling=native", "data.max_patches=2"], "between 4", "nearest valid: 4"),
        (
            ["data.tiling=native", "data.max_patches=512", "data.min_patches=600"],
            "data.min_patches is 600",
            "nearest valid: 512",
        ),
        (
            ["data.tiling=native", "data.max_patches=512", "data.min_patches=-1"],
            "between 0 and data.max_patches 512",
            "nearest valid: 0",
        ),
        (["data.video.fps=0"], "must be a number above 0", "2.0"),
        (["data.video.min_frames=0"], "must be at least 1", "nearest valid: 1"),
        (["data.video.max_frames=4"], "at least data.video.min_frames 8", "max_frames 8"),
        (["data.video.evs_rate=[]"], "has 0 numbers", "nearest valid: [0.0]"),
        (["data.video.evs_rate=[0.1,0.2,0.3]"], "has 3 numbers", "nearest valid: [0.1, 0.2]"),
        (["data.video.evs_rate=[1]"], "at least 0 and below 1", "nearest valid: 0.99"),
        (["data.video.evs_rate=[-0.5]"], "at least 0 and below 1", "nearest valid: 0.0"),
        (["data.video.evs_rate=[0.7,0.2]"], "lower end", "nearest valid: [0.2, 0.7]"),
        (["data.tiling=tiles"], "data.tiling", "published"),
        (["data.video.labels=none"], "data.video.labels", "newline"),
    ],
)
def test_a_broken_rule_names_the_nearest_value(
    overrides: list[str], rule: str, nearest: str
) -> None:
    found = problems(*overrides)
    assert any(rule in text and nearest in text for text in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.tiling=native_matched"],
        ["data.tiling=area_weighted"],
        ["data.tiling=native", "data.max_patches=1024", "data.min_patches=0"],
        ["data.video.evs_rate=[0.75]", "data.video.labels=joined"],
        ["data.video.evs_rate=[0.0,0.7]", "data.video.max_frames=8"],
    ],
)
def test_sound_settings_pass(overrides: list[str]) -> None:
    assert problems(*overrides) == []

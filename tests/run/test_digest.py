"""A digest taken while its files are written."""

import random
from pathlib import Path

import pytest

from megatron_vl.run.digest import FollowedDigest, checkpoint_digest


def test_a_followed_folder_has_the_digest_it_has_when_complete(tmp_path: Path) -> None:
    """Files grow by random steps, in turns, the last one in the order of names first."""
    chosen = random.Random(5)
    contents = {
        n: chosen.randbytes(3_000_000 + i) for i, n in enumerate((".b", "a_10", "a_2", "c"))
    }
    contents["empty"] = b""
    sizes = {name: len(data) for name, data in contents.items()}
    for name in sizes:
        (tmp_path / name).touch()
    done = dict.fromkeys(sizes, 0)
    with FollowedDigest(tmp_path, sizes) as digest:
        while left := sorted(name for name in sizes if done[name] < sizes[name]):
            name = left[-1] if len(left) == 4 else chosen.choice(left)
            step = contents[name][done[name] : done[name] + chosen.randrange(1, 900_000)]
            with (tmp_path / name).open("ab") as file:
                file.write(step)
            done[name] += len(step)
            digest.grown(name, done[name])
        found = digest.result()
    assert found == checkpoint_digest(tmp_path)


def test_a_follower_that_is_given_up_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    with FollowedDigest(tmp_path, {"a": 3}) as digest:
        digest.grown("a", 2)
    with pytest.raises(AssertionError):
        digest.result()


def test_a_file_that_shrinks_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    with FollowedDigest(tmp_path, {"a": 3}) as digest:
        digest.grown("a", 3)
        with pytest.raises(OSError, match="became shorter"):
            digest.result()

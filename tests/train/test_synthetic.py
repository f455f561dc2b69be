"""Synthetic packs hold what they promise: the checks built on them would be empty otherwise."""

import numpy as np
import pytest
import torch

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.model.evs import kept_embeddings
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.shards import shard
from megatron_vl.train.synthetic import Kind, synthetic_packs
from tests.conftest import LAPTOP


def made(*overrides: str) -> StageConfig:
    common = ["train.global_batch=4", "data.sequence_length=256", "data.document_alignment=8"]
    return load_stage(LAPTOP / "stage1.yaml", [*common, "parallel.data=1", *overrides])


def test_ranks_share_a_batch_and_steps_follow_each_other() -> None:
    config = made()
    whole = synthetic_packs(config, 1)
    parts = [synthetic_packs(config, 1, rank=rank, size=2) for rank in range(2)]
    for pack, same in zip(whole, [parts[0][0], parts[1][0], parts[0][1], parts[1][1]], strict=True):
        assert torch.equal(pack.tokens_L, same.tokens_L)
        assert torch.equal(pack.patches_PF, same.patches_PF)
    assert not torch.equal(whole[0].tokens_L, synthetic_packs(config, 0)[0].tokens_L)
    other = synthetic_packs(made("train.seed=5"), 1)[0]
    assert not torch.equal(whole[0].tokens_L, other.tokens_L)


def test_every_fourth_pack_is_text_alone() -> None:
    packs = synthetic_packs(made(), 0)
    assert [len(pack.grids) > 0 for pack in packs] == [True, False, True, True]
    assert all(pack.weight_total > 0 for pack in packs)
    assert all(pack.document_lengths[-1] == 0 for pack in packs), "no padding"
    assert {len(set(pack.grids)) for pack in packs} == {0, 2}
    assert [len(pack.videos) for pack in packs] == [1, 0, 1, 1]


def test_kinds_are_chosen() -> None:
    tiles = synthetic_packs(made(), 0, kinds=(Kind.tiles,))[0]
    assert len(set(tiles.grids)) == 1
    assert len(tiles.grids) == 2 * (len(tiles.document_lengths) - 1)
    text = synthetic_packs(made(), 0, kinds=(Kind.text,))
    assert not any(pack.grids for pack in text)


def test_a_turn_lies_in_several_shards_and_a_document_in_all() -> None:
    pack = synthetic_packs(made(), 0)[0]
    boundaries = pack.cu_seqlens.tolist()
    for size in (2, 4):
        held = [set(shard(boundaries, size, rank).tolist()) for rank in range(size)]
        first_turn = set(np.flatnonzero(pack.loss_weights_L.numpy()[: boundaries[1]])[:24].tolist())
        assert sum(bool(first_turn & places) for places in held) >= 2
        assert all(places & set(range(boundaries[1])) for places in held)


def count_frames(pack: Pack, model: VisionLanguageModel) -> list[int]:
    """What each frame of the pack's video keeps."""
    (video,) = pack.videos
    rows = slice(video.first_row, video.first_row + 4 * video.span.grid.tokens)
    with torch.no_grad():
        frames = model.encode(pack.patches_PF, pack.grids).squeeze(1)[rows].unflatten(0, (4, -1))
    kept = kept_embeddings(frames, video.span.kept)
    return torch.bincount(kept // video.span.grid.tokens, minlength=4).tolist()


def test_frames_keep_all_some_and_none(model: VisionLanguageModel) -> None:
    for number in (0, 2, 3):
        assert count_frames(synthetic_packs(made(), 0)[number], model) == [16, 0, 8, 0]


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence_length is 64.*\(text, tiles, native, video\)"):
        synthetic_packs(made("data.sequence_length=64"), 0)


@pytest.mark.parametrize("length", [512, 4096])
def test_packs_are_filled(length: int) -> None:
    pack = synthetic_packs(made(f"data.sequence_length={length}"), 0)[0]
    assert pack.num_tokens > 0.8 * length

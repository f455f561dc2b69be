"""The loader: the same packs at any layout and from any cursor, and loud errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import loader as loader_room
from megatron_vl.data.fit import Room, fit_source, shorten
from megatron_vl.data.loader import PackLoader, encode_prompt, held_out_examples
from megatron_vl.data.pack import Pack
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from tests.data.conftest import with_data


def read(
    config: StageConfig, batches: int, *, size: int = 1, cursor: int = 0, split: str = "train"
) -> list[Pack]:
    """Packs in global order, as all ranks together read them."""
    loaders = [
        PackLoader(config, split=split, rank=rank, size=size, cursor=cursor) for rank in range(size)
    ]
    packs: list[Pack] = []
    for _ in range(batches):
        shares = [loader.next_batch() for loader in loaders]
        packs += [share[at] for at in range(len(shares[0])) for share in shares]
    assert {loader.cursor for loader in loaders} == {cursor + batches * config.train.global_batch}
    for loader in loaders:
        loader.close()
    return packs


def same(one: Pack, two: Pack) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
    )


def test_packs_are_whole(stage: StageConfig, tokenizer: Tokenizer) -> None:
    packs = read(stage, 8)
    assert len(packs) == 32
    for pack in packs:
        assert pack.tokens_L.shape == (512,)
        assert pack.tiles_TCHW.shape[1:] == (3, 64, 64)
        assert len(pack.visual_positions_V) == 16 * len(pack.tiles_TCHW)
        assert (pack.tokens_L[pack.visual_positions_V] == tokenizer.image_id).all()
        assert int((pack.tokens_L == tokenizer.image_id).sum()) == len(pack.visual_positions_V)
        assert (pack.tokens_L[pack.num_tokens :] == tokenizer.pad_id).all()
        documents = len(pack.sample_keys) + (pack.num_tokens < 512)
        assert len(pack.cu_seqlens) == documents + 1
        assert int(pack.cu_seqlens[-1]) == 512
        assert int(pack.document_ids_L.max()) == documents - 1
        assert float(pack.loss_weights_L.sum()) == pytest.approx(pack.weight_total, rel=1e-5)
        starts = pack.cu_seqlens[: len(pack.sample_keys)].long()
        assert (pack.tokens_L[starts] == 10).all(), "every sample starts with a system turn"
    assert {pack.tokens_L.dtype for pack in packs} == {torch.int64}
    assert {pack.tiles_TCHW.dtype for pack in packs} == {torch.uint8}
    assert sum(len(pack.tiles_TCHW) for pack in packs) > 50


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_reads_the_same_packs(stage: StageConfig, size: int) -> None:
    for one, two in zip(read(stage, 3), read(stage, 3, size=size), strict=True):
        assert same(one, two)


def test_a_loader_opened_at_a_cursor_goes_on(stage: StageConfig) -> None:
    whole = read(stage, 4)
    rest = read(stage, 2, cursor=8, size=2)
    assert all(same(one, two) for one, two in zip(whole[8:], rest, strict=True))


def test_prefetch_changes_nothing(stage: StageConfig) -> None:
    for one, two in zip(read(stage, 2), read(with_data(stage, prefetch=0), 2), strict=True):
        assert same(one, two)


def test_validation_has_other_samples(stage: StageConfig) -> None:
    keys = {key for pack in read(stage, 2, split="val") for key in pack.sample_keys}
    assert keys
    assert all("_val_" in key for key in keys)


def test_packing_off(stage: StageConfig) -> None:
    packs = read(with_data(stage, packing=False), 2)
    assert all(len(pack.sample_keys) == 1 for pack in packs)


def test_long_samples_give_way_step_by_step(stage: StageConfig, tokenizer: Tokenizer) -> None:
    small = with_data(stage, sequence_length=128, blend={"captions": 1.0, "ocr": 1.0})
    loader = PackLoader(small, split="train", rank=0, size=1)
    limits = {fitted.max_tiles for fitted in loader._fitted.values()}
    assert 12 in limits
    assert len(limits) > 1
    assert max(fitted.length for fitted in loader._fitted.values()) <= 128
    loader.next_batch()
    loader.close()
    room = Room(sequence_length=600, tile_size=64, patch_size=8, max_tiles=12)
    store = SourceStore(small.data.root, "long_text", "train")
    fitted = fit_source(store, tokenizer, room)
    cut = [row for row in fitted if row.kept_characters >= 0]
    assert cut
    for row in cut:
        assert 560 < row.length <= 600
        before = store.sample(row.key).messages
        after = shorten(before, row.kept_characters)
        assert after[1:] == before[1:]
        assert after[0]["content"][1] == before[0]["content"][1], "the question stays"
        document = before[0]["content"][0]["text"]
        assert document.startswith(after[0]["content"][0]["text"])


def test_what_does_not_fit_is_counted(stage: StageConfig) -> None:
    tight = with_data(stage, sequence_length=64, blend={"qa": 1.0, "code": 1.0})
    loader = PackLoader(tight, split="train", rank=0, size=1)
    assert loader.dropped["code"] > 0
    kept = sum(1 for source, _ in loader._fitted if source == "code")
    assert kept + loader.dropped["code"] == 30
    loader.close()


def test_length_tables_are_kept(stage: StageConfig, root: Path) -> None:
    read(stage, 1)
    tables = list((root / "lengths").glob("*.json"))
    assert tables
    times = {table: table.stat().st_mtime_ns for table in tables}
    read(stage, 1)
    assert {table: table.stat().st_mtime_ns for table in tables} == times
    assert not list((root / "lengths").glob("*.part"))


def test_a_broken_sample_is_named_and_stays_in_the_way(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **settings: object) -> None:
        raise ValueError("cannot decode the image: truncated")

    monkeypatch.setattr(loader_room, "tile_image", broken)
    loader = PackLoader(with_data(stage, blend={"captions": 1.0}), split="train", rank=0, size=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"sample captions_train_\d+ of source captions"):
            loader.next_batch()
    assert loader.cursor == 0
    loader.close()


def test_what_is_refused(stage: StageConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest is 3"):
        PackLoader(stage, split="train", rank=0, size=3)
    with pytest.raises(FileNotFoundError, match="mvl data prepare stages/laptop"):
        PackLoader(with_data(stage, root=str(tmp_path / "none")), split="train", rank=0, size=1)
    with pytest.raises(ValueError, match="no prepared source"):
        PackLoader(with_data(stage, blend={"video": 1.0}), split="train", rank=0, size=1)
    other = replace(stage, model=replace(stage.model, vocab_size=4096))
    with pytest.raises(ValueError, match=r"model\.vocab_size=2048"):
        PackLoader(other, split="train", rank=0, size=1)


def test_prompts_for_generation(stage: StageConfig, tokenizer: Tokenizer) -> None:
    (messages, images), *_ = held_out_examples(stage, "captions", 3)
    tokens_L, tiles_TCHW, positions_V = encode_prompt(stage, messages[:1], images, reasoning=False)
    assert tokenizer.decode(tokens_L.tolist()).endswith("Assistant\n<think></think>")
    assert len(positions_V) == 16 * len(tiles_TCHW) > 0
    assert (tokens_L[positions_V] == tokenizer.image_id).all()
    text = [{"role": "user", "content": "Hello"}]
    tokens_L, tiles_TCHW, positions_V = encode_prompt(stage, text, [], reasoning=True)
    assert tokenizer.decode(tokens_L.tolist()).endswith("Assistant\n<think>\n")
    assert tiles_TCHW.shape == (0, 3, 64, 64)
    assert positions_V.shape == (0,)
    with pytest.raises(ValueError, match="0 images"):
        encode_prompt(stage, text, images, reasoning=True)

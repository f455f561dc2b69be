"""The loader: the same packs at any layout and from any cursor, bad samples, loud errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import BlendUnit, PackOrder
from megatron_vl.data import loader as loader_room
from megatron_vl.data.ledger import BadDataError, BadSample
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.plan import DataEndedError
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.sequence.layout import TEXT
from tests.data.conftest import with_data
from tests.data.reading import fingerprint, read, same


def test_packs_are_whole(stage: StageConfig, tokenizer: Tokenizer) -> None:
    packs = read(stage, 8)
    assert len(packs) == 32
    for pack in packs:
        assert pack.tokens_L.shape == (512,)
        visual_L = pack.visual_rows_L != TEXT
        assert pack.patches_PF.shape == (64 * len(pack.grids), 3 * 8 * 8)
        assert int(visual_L.sum()) == 16 * len(pack.grids)
        assert (pack.tokens_L[visual_L] == tokenizer.image_id).all()
        assert int((pack.tokens_L == tokenizer.image_id).sum()) == int(visual_L.sum())
        assert (pack.tokens_L[pack.num_tokens :] == tokenizer.pad_id).all()
        documents = len(pack.sample_keys) + (pack.num_tokens < 512)
        assert len(pack.cu_seqlens) == documents + 1
        assert int(pack.cu_seqlens[-1]) == 512
        assert int(pack.document_ids_L.max()) == documents - 1
        assert float(pack.loss_weights_L.sum()) == pytest.approx(pack.weight_total, rel=1e-5)
        starts = pack.cu_seqlens[: len(pack.sample_keys)].long()
        assert (pack.tokens_L[starts] == 10).all(), "every sample starts with a system turn"
    assert {pack.tokens_L.dtype for pack in packs} == {torch.int64}
    assert {pack.patches_PF.dtype for pack in packs} == {torch.uint8}
    assert sum(len(pack.grids) for pack in packs) > 50


@pytest.mark.parametrize(("size", "workers"), [(2, 1), (4, 3), (1, 4)])
def test_any_number_of_ranks_and_threads_reads_the_same_packs(
    stage: StageConfig, size: int, workers: int
) -> None:
    other = read(with_data(stage, workers=workers), 3, size=size)
    for one, two in zip(read(stage, 3), other, strict=True):
        assert same(one, two)


def test_a_loader_opened_at_a_cursor_goes_on(stage: StageConfig) -> None:
    whole = read(stage, 4)
    rest = read(stage, 2, cursor=8, size=2)
    assert all(same(one, two) for one, two in zip(whole[8:], rest, strict=True))


def test_prefetch_changes_nothing(stage: StageConfig) -> None:
    for one, two in zip(read(stage, 2), read(with_data(stage, prefetch=0), 2), strict=True):
        assert same(one, two)


def test_validation_has_other_samples_in_random_order_without_end(stage: StageConfig) -> None:
    finite = with_data(stage, epochs={"text": 0.5})
    keys = {key for pack in read(finite, 20, split="val") for key in pack.sample_keys}
    assert keys
    assert all("_val_" in key for key in keys)
    mixed = with_data(stage, order=PackOrder.random)
    one, two = read(stage, 2, split="val"), read(mixed, 2, split="val")
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert any(not same(a, b) for a, b in zip(read(stage, 2), read(mixed, 2), strict=True))


def test_packing_off(stage: StageConfig) -> None:
    packs = read(with_data(stage, packing=False), 2)
    assert all(len(pack.sample_keys) == 1 for pack in packs)


def test_limits_of_a_pack_are_kept(stage: StageConfig) -> None:
    packs = read(with_data(stage, max_tiles_per_pack=13, max_samples_per_pack=4), 12)
    assert max(len(pack.grids) for pack in packs) == 13
    assert max(len(pack.sample_keys) for pack in packs) == 4
    free = read(stage, 12)
    assert max(len(pack.sample_keys) for pack in free) > 4


def test_documents_start_at_multiples_of_the_alignment(stage: StageConfig) -> None:
    packs = read(with_data(stage, document_alignment=16), 4)
    assert all((pack.cu_seqlens % 16 == 0).all() for pack in packs)
    assert sum(pack.num_tokens for pack in packs) > 0.85 * 512 * len(packs)


def test_token_weights_share_out_tokens(stage: StageConfig) -> None:
    blend = {"ocr": 1.0, "code": 1.0}
    by_tokens = with_data(stage, blend=blend, blend_unit=BlendUnit.tokens, prefetch=0)
    loader = PackLoader(by_tokens, split="train", rank=0, size=1)
    tokens = {"ocr": 0, "code": 0}
    for number in range(200):
        for sample in loader.planned(number):
            tokens[sample.source] += sample.length
    loader.close()
    assert tokens["ocr"] / tokens["code"] == pytest.approx(1.0, rel=0.1)


def test_what_does_not_fit_is_counted(stage: StageConfig) -> None:
    tight = with_data(stage, sequence_length=64, blend={"qa": 1.0, "code": 1.0}, max_tiles=1)
    loader = PackLoader(tight, split="train", rank=0, size=1)
    assert 0 < loader.dropped["code"] < 30
    kept = {loader.identify(s)[1] for n in range(400) for s in loader.planned(n)}
    assert sum("code" in key for key in kept) + loader.dropped["code"] == 30
    loader.close()


def break_samples(monkeypatch: pytest.MonkeyPatch, broken: set[str]) -> None:
    """Make some keys, or all, impossible to decode."""
    encode = loader_room.encode_sample

    def encode_or_fail(store, fitted, tokenizer, room):  # type: ignore[no-untyped-def]
        if fitted.key in broken or "*" in broken:
            raise ValueError("cannot decode the image: truncated")
        return encode(store, fitted, tokenizer, room)

    monkeypatch.setattr(loader_room, "encode_sample", encode_or_fail)


def test_a_bad_sample_is_replaced_the_same_everywhere_and_reported(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(stage, 3)
    lenient = with_data(stage, max_bad_fraction=0.01)
    # The first photograph of the third pack, and the sample that would stand in for it.
    key = next(key for key in whole[2].sample_keys if key.startswith("captions"))
    break_samples(monkeypatch, {key})
    found = read(lenient, 3)
    stand_in = found[2].sample_keys[whole[2].sample_keys.index(key)]
    assert stand_in != key
    assert stand_in.startswith("captions_train")
    monkeypatch.undo()
    break_samples(monkeypatch, {key, stand_in})
    heard: list[BadSample] = []
    again = PackLoader(lenient, split="train", rank=0, size=1, report=heard.append)
    packs = [pack for _ in range(3) for pack in again.next_batch()]
    again.close()
    assert key not in {name for pack in packs for name in pack.sample_keys}
    assert again.bad.counts["captions"] == len({bad.key for bad in heard} | {stand_in})
    told = next(bad for bad in heard if (bad.key, bad.pack) == (key, 2))
    assert told.source == "captions"
    assert "truncated" in told.error
    assert told.instead in packs[2].sample_keys
    for size in (1, 2, 4):
        other = read(with_data(lenient, workers=2), 3, size=size)
        assert [fingerprint(pack) for pack in other] == [fingerprint(pack) for pack in packs]
    for before, after in zip(whole, packs, strict=True):
        assert after.num_tokens <= before.num_tokens
        assert len(after.sample_keys) == len(before.sample_keys)


def test_too_many_bad_samples_fail_and_stay_in_the_way(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = read(stage, 1)[0].sample_keys[0]
    break_samples(monkeypatch, {key})
    strict = with_data(stage, max_bad_fraction=0.0)
    loader = PackLoader(strict, split="train", rank=0, size=1)
    for _ in range(2):
        with pytest.raises(BadDataError, match=f"allows 0; the first: sample {key} of source"):
            loader.next_batch()
    assert loader.cursor == 0
    loader.close()


def test_a_source_of_which_nothing_decodes_fails_at_once(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_samples(monkeypatch, {"*"})
    lenient = with_data(stage, blend={"captions": 1.0}, max_bad_fraction=0.5)
    loader = PackLoader(lenient, split="train", rank=0, size=1)
    with pytest.raises(BadDataError, match="first 8 samples of source captions can all not"):
        loader.next_batch()
    loader.close()


def test_broken_rows_of_the_length_table_count_as_bad(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = loader_room.length_table

    def with_errors(*args, **settings):  # type: ignore[no-untyped-def]
        return replace(table(*args, **settings), bad=3, errors=("captions_1: cut off",))

    monkeypatch.setattr(loader_room, "length_table", with_errors)
    with pytest.raises(ValueError, match="3 of 24 samples of source captions cannot be read"):
        PackLoader(stage, split="train", rank=0, size=1)
    PackLoader(with_data(stage, max_bad_fraction=0.2), split="train", rank=0, size=1).close()


def test_a_blend_that_ends_too_soon_is_refused_at_the_start(stage: StageConfig) -> None:
    few = with_data(stage, blend={"text": 1.0}, epochs={"text": 1.0})
    PackLoader(few, split="train", rank=0, size=1).close()
    long = replace(few, train=replace(few.train, steps=1000))
    with pytest.raises(ValueError, match=r"at most 40 packs, train\.steps 1000"):
        PackLoader(long, split="train", rank=0, size=1)
    packs_there = replace(few, train=replace(few.train, steps=9))
    with pytest.raises(ValueError, match=r"give \d+ packs, train\.steps 9 x"):
        PackLoader(packs_there, split="train", rank=0, size=1)


def test_the_end_of_the_data_is_told_once_all_of_it_is_used(stage: StageConfig) -> None:
    few = with_data(stage, blend={"text": 1.0}, epochs={"text": 1.0})
    for prefetch in (0, 3):
        loader = PackLoader(with_data(few, prefetch=prefetch), split="train", rank=0, size=1)
        keys: list[str] = []

        def use_all(loader: PackLoader, keys: list[str]) -> None:
            for _ in range(50):
                keys += [key for pack in loader.next_batch() for key in pack.sample_keys]

        with pytest.raises(DataEndedError, match=r"data ends after pack \d+: .*in step \d"):
            use_all(loader, keys)
        assert len(keys) == len(set(keys))
        assert 20 < len(keys) <= 40
        loader.close()


def test_what_is_refused(stage: StageConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest is 3"):
        PackLoader(stage, split="train", rank=0, size=3)
    with pytest.raises(ValueError, match="no whole number of global batches"):
        PackLoader(stage, split="train", rank=0, size=1, cursor=6)
    with pytest.raises(FileNotFoundError, match="mvl data prepare stages/laptop"):
        PackLoader(with_data(stage, root=str(tmp_path / "none")), split="train", rank=0, size=1)
    with pytest.raises(ValueError, match="no prepared source"):
        PackLoader(with_data(stage, blend={"films": 1.0}), split="train", rank=0, size=1)
    other = replace(stage, model=replace(stage.model, vocab_size=4096))
    with pytest.raises(ValueError, match=r"model\.vocab_size=2048"):
        PackLoader(other, split="train", rank=0, size=1)

"""Killed and started again, at other layouts: the same global batches, every sample once."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import encode as encode_room
from megatron_vl.data import loader as loader_room
from megatron_vl.data.ledger import Ledger, lineage, read_lines
from megatron_vl.data.loader import PackLoader
from tests.data.conftest import with_data
from tests.data.reading import fingerprint, next_global_batch

BATCH = 12
KILLS = 50


@pytest.fixture
def finite(stage: StageConfig) -> StageConfig:
    """Three sources, each gone through a few times and a bit; 12 packs a step."""
    blend = {"ocr": 2.0, "text": 3.0, "code": 2.0}
    epochs = dict.fromkeys(blend, 6.5)
    config = with_data(stage, blend=blend, epochs=epochs, sequence_length=256, packing_window=90)
    return replace(config, train=replace(config.train, global_batch=BATCH, steps=1))


@dataclass
class Undisturbed:
    """One rank that was never killed: fingerprints of packs and samples, step by step."""

    batches: list[list[str]] = field(default_factory=list)
    samples: list[list[tuple[str, str, int]]] = field(default_factory=list)


def steps_of(config: StageConfig) -> int:
    """Whole global batches of the blend."""
    loader = PackLoader(config, split="train", rank=0, size=1)
    try:
        return sum(len(table) for table in loader._plan.rounds()) // BATCH
    finally:
        loader.close()


def undisturbed(config: StageConfig, steps: int) -> Undisturbed:
    found = Undisturbed()
    loader = PackLoader(config, split="train", rank=0, size=1)
    for step in range(steps):
        found.batches.append([fingerprint(pack) for pack in next_global_batch([loader])])
        found.samples.append(
            [
                loader.identify(sample)
                for number in range(step * BATCH, (step + 1) * BATCH)
                for sample in loader.planned(number)
            ]
        )
    loader.close()
    return found


@dataclass
class Life:
    """One attempt: some ranks with some threads each, from the last save to a kill."""

    config: StageConfig
    folder: Path
    cursor: int
    ranks: int
    use_mark: bool
    most: int
    """Packs there are in whole batches."""

    def __post_init__(self) -> None:
        mark = self.folder / "mark.json" if self.use_mark else None
        self.loaders = [
            PackLoader(
                self.config,
                split="train",
                rank=rank,
                size=self.ranks,
                cursor=self.cursor,
                mark=mark,
            )
            for rank in range(self.ranks)
        ]
        self.ledger = Ledger(self.folder / "data.jsonl")
        self.step = self.cursor // BATCH
        self.ledger.opened(step=self.step, cursor=self.cursor, plan=self.loaders[0].fingerprint)

    def run(self, steps: int) -> Iterator[list[str]]:
        """Fingerprints of each global batch, ranks reading at the same time."""
        with ThreadPoolExecutor(self.ranks) as ranks:
            for _ in range(steps):
                waiting = [ranks.submit(loader.next_batch) for loader in self.loaders]
                shares = [future.result() for future in waiting]
                self.step += 1
                record = self.loaders[0].batch_record((self.step - 1) * BATCH)
                self.ledger.step(self.step, record)
                found = {}
                for loader, share in zip(self.loaders, shares, strict=True):
                    found.update(zip(loader._places, share, strict=True))
                yield [fingerprint(found[place]) for place in range(BATCH)]

    def save(self) -> int:
        """As the trainer does at a checkpoint; returns the cursor."""
        (self.folder / "mark.json").write_text(self.loaders[0].mark())
        self.ledger.saved(self.step)
        return self.loaders[0].cursor

    def kill(self, random: Random) -> None:
        """Some ranks are already in the next step; a line of the ledger may be cut short."""
        for loader in self.loaders:
            if random.random() < 0.3 and self.step * BATCH + BATCH <= self.most:
                loader.next_batch()
        if random.random() < 0.3:
            with self.ledger.path.open("a") as file:
                file.write('{"step": 99, "pac')
        for loader in self.loaders:
            loader.close()


def test_fifty_kills_change_no_global_batch_and_lose_no_sample(
    finite: StageConfig, tmp_path: Path
) -> None:
    steps = steps_of(finite)
    assert steps >= 15
    truth = undisturbed(finite, steps)
    random, cursor, kills = Random(20), 0, 0
    layouts: Counter[tuple[int, int]] = Counter()
    for _ in range(400):
        if kills >= KILLS and cursor == steps * BATCH:
            break
        if cursor == steps * BATCH:
            cursor = 0  # all was done with kills to spare: once more from the start
            (tmp_path / "data.jsonl").unlink()
        ranks, workers = random.randint(1, 4), random.randint(1, 4)
        config = with_data(finite, workers=workers, prefetch=random.randint(0, 1))
        life = Life(config, tmp_path, cursor, ranks, random.random() < 0.5, steps * BATCH)
        wanted = min(random.randint(0, 3), steps - life.step)
        for batch in life.run(wanted):
            assert batch == truth.batches[life.step - 1], f"step {life.step} at {ranks} ranks"
            if random.random() < 0.25:
                cursor = life.save()
        if life.step == steps:
            cursor = life.save()
        life.kill(random)
        kills += 1
        layouts[ranks, workers] += 1
    assert kills >= KILLS
    assert {ranks for ranks, _ in layouts} == {workers for _, workers in layouts} == {1, 2, 3, 4}
    survived = lineage(tmp_path / "data.jsonl")
    assert [line["step"] for line in survived] == list(range(1, steps + 1))
    _exactly_once(finite, truth, survived)
    written = sum("step" in line for line in read_lines(tmp_path / "data.jsonl"))
    assert written > steps, "some steps were lost and run again"


def _exactly_once(config: StageConfig, truth: Undisturbed, survived: list[dict]) -> None:
    """The lineage holds every sample of every epoch once, but for what fills no global batch."""
    loader = PackLoader(config, split="train", rank=0, size=1)
    seen: Counter[tuple[str, str, int]] = Counter()
    for line, samples in zip(survived, truth.samples, strict=True):
        record = loader.batch_record(line["packs"][0])
        assert (record.ids, list(record.packs)) == (line["ids"], line["packs"])
        assert (record.samples, line["samples"]) == (len(samples), len(samples))
        seen.update(samples)
    assert set(seen.values()) == {1}
    total = int(loader._plan.total_samples)
    packs = sum(len(table) for table in loader._plan.rounds())
    rest = [
        loader.identify(sample)
        for number in range(len(survived) * BATCH, packs)
        for sample in loader.planned(number)
    ]
    loader.close()
    assert len(rest) < 200
    assert len(seen) + len(set(rest)) == total
    assert not set(rest) & set(seen)


def test_resuming_in_the_middle_of_a_large_window_decodes_nothing(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at opening nor for the length tables; then the packs that are asked for alone."""
    wide = with_data(stage, packing_window=5000, prefetch=0, sequence_length=500)
    loader = PackLoader(wide, split="train", rank=0, size=1)
    assert sum(len(loader.planned(number)) for number in range(400)) < 5000
    whole = [loader.next_batch() for _ in range(4)]
    loader.close()
    encoded: list[str] = []
    pictures: list[int] = []
    encode, decode = loader_room.encode_sample, encode_room.decode_image
    monkeypatch.setattr(
        loader_room,
        "encode_sample",
        lambda store, fitted, *rest: (encoded.append(fitted.key), encode(store, fitted, *rest))[1],
    )
    monkeypatch.setattr(
        encode_room, "decode_image", lambda data: (pictures.append(1), decode(data))[1]
    )
    # Another length has no tables yet: they are made while the loader opens.
    for config, cursor in ((wide, 3 * 4), (with_data(wide, sequence_length=492), 200)):
        resumed = PackLoader(config, split="train", rank=1, size=2, cursor=cursor)
        assert (encoded, pictures) == ([], [])
        packs = resumed.next_batch()
        assert encoded == [key for pack in packs for key in pack.sample_keys]
        resumed.close()
        encoded.clear()
        pictures.clear()
    resumed = PackLoader(wide, split="train", rank=0, size=1, cursor=12)
    assert [fingerprint(pack) for pack in resumed.next_batch()] == [
        fingerprint(pack) for pack in whole[3]
    ]
    resumed.close()

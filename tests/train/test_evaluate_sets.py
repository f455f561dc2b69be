"""Held-out losses by source and by modality: against each document alone, and at any layout."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_vl.config.load import to_yaml
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.engine import process_groups
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.evaluate_sets import evaluate_set, held_out_sets
from tests.conftest import LAPTOP, SmallData
from tests.support.packs import run_pack
from tests.support.ranks import RankPool
from tests.train import jobs
from tests.train.conftest import MakeConfig

MODALITY = {"captions": "image", "ocr": "image", "clips": "video", "text": "text"}
BLEND = "data.blend={captions: 2, ocr: 2, clips: 2, text: 2}"


def expected(config: StageConfig, trainee: jobs.Trainee) -> dict[str, float]:
    """Square-averaged losses from the logits of each pack, turn by turn, by what a key says."""
    loader = PackLoader(config, split="val", rank=0, size=1)
    packs = loader.next_batch()
    loader.close()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    trainee.module.eval()
    for pack in packs:
        with torch.no_grad():
            logits_LV = run_pack(trainee.module, pack).double()
        losses_L = F.cross_entropy(logits_LV, pack.labels_L, reduction="none")
        for number, key in enumerate(pack.sample_keys):
            source = key.partition("_val_")[0]
            weights_L = pack.loss_weights_L * (pack.document_ids_L == number)
            for name in ("all", source, f"modality {MODALITY[source]}"):
                sums[name][0] += float((losses_L * weights_L).sum())
                sums[name][1] += float(weights_L.sum())
    return {name: loss / weight for name, (loss, weight) in sums.items()}


def test_by_source_and_modality(world: None, stage: MakeConfig) -> None:
    config = stage("stage2", BLEND, "data.sequence_length=768", "train.global_batch=4")
    config.data.video.evs_rate = [0.0]
    trainee = jobs.drawn(config)
    found = evaluate_set(config, trainee, 1)
    wanted = expected(config, trainee)
    assert found.loss == pytest.approx(wanted.pop("all"), rel=1e-5)
    told = found.sources | {f"modality {name}": loss for name, loss in found.modalities.items()}
    assert told == pytest.approx(wanted, rel=1e-5)
    assert set(found.modalities) == {"text", "image", "video"}
    assert found.metrics("s")["eval/s/source/text"] == found.sources["text"]
    assert evaluate_set(config, trainee, 1) == found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [["parallel.data=2", "parallel.context=2"], ["parallel.tensor=2", "parallel.pipeline=2"]],
    ids="-".join,
)
def test_at_any_layout(ranks: RankPool, small_data: SmallData, layout: list[str]) -> None:
    common = [
        small_data.override, "parallel.data=1", "parallel.context=1", "train.global_batch=2", BLEND,
        "data.sequence_length=768", "data.document_alignment=4",
    ]  # fmt: skip
    file = LAPTOP / "stage2.yaml"
    one = ranks.run(1, jobs.held_out, file, common, 1)[0]
    for found in ranks.run(4, jobs.held_out, file, [*common, *layout], 1):
        assert found.loss == pytest.approx(one.loss, rel=1e-5)
        assert found.sources == pytest.approx(one.sources, rel=1e-5)
        assert found.modalities == pytest.approx(one.modalities, rel=1e-5)


def test_the_sets_are_the_same_whichever_stage_looks(stage: MakeConfig, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    names = ["stage1", "stage2", "stage4"]
    planned = [{"name": name, "folder": name} for name in (*names, "again")]
    node = {"name": "checked", "folder": "checked", "kind": "evaluate"}
    run.create({"stages": [*planned, node]})
    configs = {name: stage(name, "evaluation.packs=2") for name in names}
    for same in ("again", "checked"):
        run.stage(same).config_path.write_text(to_yaml(configs["stage1"]))
    for name, config in configs.items():
        run.stage(name).config_path.write_text(to_yaml(config))
    plans = []
    for config in configs.values():
        sets = held_out_sets(run, config)
        assert list(sets) == names
        assert {one.data.document_alignment for one in sets.values()} == {4}
        loaders = [PackLoader(one, split="val", rank=0, size=1) for one in sets.values()]
        plans.append([loader.batch_record(0).ids for loader in loaders])
        for loader in loaders:
            loader.close()
    assert plans[0] == plans[1] == plans[2]
    assert len(set(plans[0])) == 3
    longest = configs["stage1"].data.sequence_length
    configs["stage1"].evaluation.longest_pack = longest
    shorter = held_out_sets(run, configs["stage1"])
    assert list(shorter) == [n for n in names if configs[n].data.sequence_length <= longest]
    process_groups.destroy()

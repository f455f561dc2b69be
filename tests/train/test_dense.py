"""Pretraining of the encoder: a few steps teach it, and it is the recipe's encoder."""

from dataclasses import replace

import torch

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import Part
from megatron_vl.infer.model import empty_model
from megatron_vl.model.initialize import draw_tensor
from megatron_vl.model.vlm import PART_PREFIXES
from megatron_vl.train.dense import DenseSettings, pretrain_encoder
from tests.conftest import LAPTOP


def test_a_few_steps_teach_the_encoder_and_move_nothing_else() -> None:
    config = load_stage(LAPTOP / "stage1.yaml", ["parallel.data=1"])
    few = DenseSettings(steps=0, tiles=6, held_out_tiles=24)
    said: dict[int, str] = {}
    trained = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for steps in (0, 25):
        with empty_model(config) as (module, groups):
            trained[steps] = {
                name: tensor.clone()
                for name, tensor in pretrain_encoder(
                    module, groups, config, replace(few, steps=steps),
                    lambda line, steps=steps: said.update({steps: line}),  # type: ignore[misc]
                ).items()
            }  # fmt: skip
    torch.set_num_threads(threads)
    prefix = PART_PREFIXES[Part.encoder]
    assert trained[25].keys() == trained[0].keys()
    for name, start in trained[0].items():
        assert name.startswith(prefix)
        assert torch.equal(start, draw_tensor(name, tuple(start.shape), config.model, 1234))
        assert not torch.equal(start, trained[25][name])
    before, after = (float(said[steps].split("loss ")[1].split(",")[0]) for steps in (0, 25))
    assert after < before - 0.5

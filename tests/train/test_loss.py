"""The square-averaged loss against its definition, written from turns and from plain autograd."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.engine import process_groups
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.layout import UNSUPERVISED, Document
from megatron_vl.train.build import build_model
from megatron_vl.train.loss import undo_averaging, weighted_sum
from megatron_vl.train.step import count, run_batch
from tests.support.packs import run_pack
from tests.train import jobs
from tests.train.conftest import MakeConfig

# Supervised tokens of each assistant turn of each document; the lone 1 is a turn of one token.
TURNS = [[5, 1, 40], [17], [], [2, 9]]


def document(turns: list[int], generator: np.random.Generator) -> Document:
    """User tokens between the turns, and at both ends."""
    ids: list[int] = [UNSUPERVISED] * 4
    for number, length in enumerate(turns):
        ids += [number] * length + [UNSUPERVISED] * 3
    return Document(generator.integers(0, 2048, len(ids)), np.array(ids, dtype=np.int32))


def by_turns(documents: list[Document], losses_L: Tensor) -> tuple[float, float]:
    """sum(sqrt(n) * mean loss of a turn) and sum(sqrt(n)), a token at a time, in float64.

    The loss of a token stands one position before it, where it is predicted.
    """
    above = below = 0.0
    start = 0
    for one in documents:
        turns: dict[int, list[float]] = {}
        for position in range(1, len(one)):
            turn = int(one.turn_ids_N[position])
            if turn != UNSUPERVISED:
                turns.setdefault(turn, []).append(float(losses_L[start + position - 1]))
        for losses in turns.values():
            above += math.sqrt(len(losses)) * (math.fsum(losses) / len(losses))
            below += math.sqrt(len(losses))
        start += len(one)
    return above, below


def test_a_pack_is_the_definition_over_its_turns() -> None:
    generator = np.random.default_rng(51)
    documents = [document(turns, generator) for turns in TURNS]
    # A turn that begins with the document: its first token is predicted by nothing.
    first = Document(generator.integers(0, 2048, 6), np.zeros(6, dtype=np.int32))
    documents.append(first)
    keys = [str(number) for number in range(len(documents))]
    pack = make_pack(documents, [], keys, length=160, patch_size=8, pad_token=0)
    losses_L = torch.rand(160, generator=torch.Generator().manual_seed(52)) * 9
    above, below = by_turns(documents, losses_L)
    assert pack.weight_total == pytest.approx(below, rel=1e-12)
    assert float(weighted_sum(losses_L.unsqueeze(0), pack.loss_weights_L)) == pytest.approx(
        above, rel=1e-5
    )
    # The plain mean over tokens is something else, so the weights matter here.
    supervised = pack.loss_weights_L > 0
    assert abs(float(losses_L[supervised].mean()) - above / below) > 0.01


def test_half_precision_losses_are_summed_in_float32() -> None:
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert float(weighted_sum(losses, torch.ones(4096))) == 4096.0


def test_undoing_counts_micro_batches_and_ranks() -> None:
    assert undo_averaging(3, 4) == 12.0


def plain_loss(module: VisionLanguageModel, packs: list[Pack]) -> Tensor:
    """The batch's loss without megatron-core's schedule or gradient buffers."""
    total, weight = torch.zeros(()), 0.0
    for pack in packs:
        losses_L = run_pack(module, pack, with_labels=True)
        total = total + (losses_L * pack.loss_weights_L).sum()
        weight += pack.weight_total
    return total / weight


def test_accumulated_gradients_are_those_of_the_whole_batch(world: None, stage: MakeConfig) -> None:
    """Packs of unequal weight: averaging pack by pack would give other gradients."""
    config = stage("stage1", "train.global_batch=3")
    loader = PackLoader(config, split="train", rank=0, size=1)
    packs = loader.next_batch()
    loader.close()
    assert len({pack.weight_total for pack in packs}) > 1

    trainee = jobs.drawn(config)
    trainee.wrapped.zero_grad_buffer()
    loss = run_batch(packs, count(packs, trainee), trainee, config, forward_only=False)
    ours = {name: p.main_grad.clone() for name, p in trainee.module.named_parameters()}

    process_groups.destroy()
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    expected = plain_loss(module, packs)
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in module.named_parameters():
        assert float(parameter.grad.norm()) > 0, name
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(error) < 1e-5, name

"""What ranks do in the tests of the Mamba exchange."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from torch import Tensor

from megatron_vl.engine import process_groups
from megatron_vl.engine.context_parallel import PackedMambaContext
from megatron_vl.engine.hybrid_stack import PackedMambaMixer
from megatron_vl.engine.packed import PackedSequence, packed_sequence
from megatron_vl.train.build import build_model
from tests.train.exact_jobs import noisy_model, stage

CPU = torch.device("cpu")


def described(lengths: Sequence[int], size: int, rank: int) -> PackedSequence:
    """A pack of documents as a context rank is given it."""
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    return packed_sequence(
        torch.from_numpy(ids),
        torch.from_numpy(ends),
        max(lengths),
        CPU,
        context_size=size,
        context_rank=rank,
    )


def exchanged(file: Path, overrides: Sequence[str]) -> dict[str, bool]:
    """One document: the exchange of megatron-core's own class, bit by bit, both ways, with
    gradients."""
    config = stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    mixer = next(m for m in module.modules() if isinstance(m, PackedMambaMixer))
    ours = mixer.cp
    assert isinstance(ours, PackedMambaContext)
    theirs = MambaContextParallel(
        groups.cp,
        mixer.d_inner_local_tp,
        mixer.nheads_local_tp,
        mixer.ngroups_local_tp,
        mixer.d_state,
        mixer.conv1d,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        mixer.D_has_hdim,
    )
    size, rank = groups.cp.size(), groups.cp.rank()
    pack = described([24 * size], size, rank)
    generator = torch.Generator().manual_seed(100 + rank)
    channels = 2 * mixer.d_inner_local_tp + 2 * mixer.ngroups_local_tp * mixer.d_state
    sent = torch.randn(24, 1, channels + mixer.nheads_local_tp, generator=generator)
    back = torch.randn(24 * size, 1, ours.d_inner_local_tpcp, generator=generator)
    equal = {}
    for name, given in (("pre_conv_ssm", sent), ("post_conv_ssm", back)):
        results, gradients = [], []
        for exchange, packed in ((ours, pack), (theirs, None)):
            values = given.clone().requires_grad_()
            result = getattr(exchange, name)(values, packed)
            weights = torch.arange(result.numel()).view_as(result) % 7 + 1.0
            (result * weights).sum().backward()
            results.append(result.detach())
            gradients.append(values.grad)
        equal[name] = torch.equal(*results)
        equal[name + " gradient"] = torch.equal(*gradients)
    return equal


def mixed(file: Path, overrides: Sequence[str], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A mixer over a pack: its output here, and the places in the pack of the tokens here."""
    config = stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = noisy_model(config, groups)
    mixer = next(m for m in module.modules() if isinstance(m, PackedMambaMixer))
    pack = described(lengths, groups.cp.size(), groups.cp.rank())
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sum(lengths), 1, config.model.decoder.hidden_size, generator=generator)
    with torch.no_grad():
        output, _ = mixer(pack.local(hidden), packed_seq_params=pack)
    return output, pack.local(torch.arange(sum(lengths)))

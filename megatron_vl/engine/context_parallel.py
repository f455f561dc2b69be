"""What context-parallel ranks exchange: keys and values, Mamba's heads, visual embeddings.

Every rank holds its zig-zag shard of each document (see `sequence.shards`). Attention gathers the
keys and values of the whole pack. A Mamba layer trades: before its convolution each rank gives away
all heads of its tokens but its own share and receives that share for every token of the pack, in
one all-to-all of z, x, B, C and dt together; behind its scan one all-to-all goes back. The order of
tokens comes from the index map, not from the device. Gradients take the same ways back.

Differs from megatron-core's MambaContextParallel, which sends five messages and asks Transformer
Engine for the order of a pack.

Shapes: S tokens of this rank, L tokens of the pack, B batch (1), R context ranks, W what one rank
receives of each token, G key/value heads, D head width, N state, V visual embeddings.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vl.engine.packed import PackedSequence


def gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' tensors, joined along the first axis; gradients are summed over the ranks."""
    return gather_from_sequence_parallel_region(
        tensor, tensor_parallel_output_grad=True, group=group
    )


class _Reorder(torch.autograd.Function):
    """Rows in another order. The way back is a selection too, where autograd would add up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_L: Tensor, inverse_L: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_L)
        return rows.index_select(0, order_L)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse_L,) = ctx.saved_tensors
        return gradient.index_select(0, inverse_L), None, None


def to_pack_order(joined: Tensor, pack: PackedSequence) -> Tensor:
    """From all ranks' tokens, rank after rank, to the pack's order (first axis)."""
    return _Reorder.apply(joined, pack.unshard_L, pack.joined_L)


def to_rank_order(whole: Tensor, pack: PackedSequence) -> Tensor:
    """The opposite of `to_pack_order`."""
    return _Reorder.apply(whole, pack.joined_L, pack.unshard_L)


def gather_keys_and_values(
    key_SGD: Tensor, value_SGD: Tensor, pack: PackedSequence, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole pack, in its order; one message for both."""
    both_LGD = gather(torch.cat([key_SGD, value_SGD], dim=-1), group)
    key_LGD, value_LGD = to_pack_order(both_LGD, pack).chunk(2, dim=-1)
    return key_LGD, value_LGD


class PackedMambaContext(MambaContextParallel):
    """The exchange around one Mamba layer over a pack.

    Where there are fewer groups than ranks, B and C of a group go to every rank that holds heads of
    it. A rank's slices of the parameters are megatron-core's.
    """

    def pre_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """(S, B, all z x B C dt) to (L, B, this rank's z x B C dt), in the pack's order."""
        if self.cp_size == 1:
            return input_
        assert isinstance(packed_seq_params, PackedSequence)
        states = self.ngroups_local_tp * self.d_state
        inner = self.d_inner_local_tp
        z_SD, x_SD, B_SN, C_SN, dt_SH = input_.squeeze(1).split(
            [inner, inner, states, states, self.nheads_local_tp], dim=-1
        )
        parts = [
            self._by_rank(z_SD),
            self._by_rank(x_SD),
            self._groups_by_rank(B_SN),
            self._groups_by_rank(C_SN),
            self._by_rank(dt_SH),
        ]
        sent_RSW = torch.cat(parts, dim=-1).transpose(0, 1).contiguous()
        joined_LW = all_to_all(self.cp_group, sent_RSW).flatten(0, 1)
        return to_pack_order(joined_LW, packed_seq_params).unsqueeze(1)

    def post_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """(L, B, this rank's channels) in the pack's order to (S, B, all channels)."""
        if self.cp_size == 1:
            return input_
        assert isinstance(packed_seq_params, PackedSequence)
        joined_LW = to_rank_order(input_.squeeze(1), packed_seq_params)
        received_RSW = all_to_all(self.cp_group, joined_LW.unflatten(0, (self.cp_size, -1)))
        return received_RSW.transpose(0, 1).flatten(1).unsqueeze(1)

    def _by_rank(self, values_SC: Tensor) -> Tensor:
        """Channels cut into one run a rank: (S, R, C/R)."""
        return values_SC.unflatten(1, (self.cp_size, -1))

    def _groups_by_rank(self, values_SN: Tensor) -> Tensor:
        """B or C of the groups each rank needs: (S, R, groups of a rank * N)."""
        groups_SGN = values_SN.unflatten(1, (self.ngroups_local_tp, self.d_state))
        return self._by_rank(
            groups_SGN.repeat_interleave(self.group_repeat_count, dim=1).flatten(1)
        )

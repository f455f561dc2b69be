"""megatron-core's Mamba mixer and stack, with what this project needs them to read.

`PackedMambaMixer` takes document ids from the pack's description instead of rebuilding them in
every layer, and picks the scan kernel. `HybridStack` takes its final norm from the layer spec
(megatron-core names Transformer Engine's there) and refuses a split that would lose layers.

Shapes: L packed tokens, B batch (1 when packed), C channels, H Mamba heads, P channels of a head,
G groups, N state, W convolution width, D inner width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.config.check import nearest_first_stage
from megatron_vl.engine.context_parallel import PackedMambaContext
from megatron_vl.engine.packed import PackedSequence
from megatron_vl.engine.platform import PLATFORM, Platform
from megatron_vl.kernels import conv1d, ssd


def _triton_scan_after_own_convolution(
    zxBCdt_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    *,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
) -> Tensor:
    """mamba_ssm's Triton scan behind the project's convolution, where causal_conv1d is absent.

    The gate is applied inside the scan, the grouped norm by the mixer afterwards.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    assert not norm_before_gate
    inner = A_H.shape[0] * headdim
    state = (weight_CW.shape[0] - inner) // 2
    z_BLD, xBC_BLC, dt_BLH = zxBCdt_BLC.split([inner, weight_CW.shape[0], A_H.shape[0]], dim=-1)
    convolved_BCL = conv1d.causal_conv1d_fn(
        xBC_BLC.transpose(1, 2), weight_CW, bias_C, seq_idx=seq_idx, activation=activation
    )
    assert isinstance(convolved_BCL, Tensor)
    x_BLD, B_BLN, C_BLN = convolved_BCL.transpose(1, 2).split([inner, state, state], dim=-1)
    y_BLHP = mamba_chunk_scan_combined(
        x_BLD.unflatten(-1, (-1, headdim)),
        dt_BLH,
        A_H,
        B_BLN.unflatten(-1, (ngroups, -1)),
        C_BLN.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        z=z_BLD.unflatten(-1, (-1, headdim)),
        dt_bias=dt_bias_H,
        dt_softplus=True,
        seq_idx=seq_idx,
    )
    return y_BLHP.flatten(-2)


def scan_kernel(platform: Platform) -> Callable[..., Any]:
    """The fastest split-convolution-scan this machine has, all with one signature.

    Each gives a tensor (B, L, D) as called here, without final states.
    """
    if platform.has_mamba_ssm and platform.has_causal_conv1d:
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        return mamba_split_conv1d_scan_combined
    if platform.has_mamba_ssm:
        return _triton_scan_after_own_convolution
    return ssd.mamba_split_conv1d_scan_combined


class PackedMambaMixer(MambaMixer):
    """The Mamba-2 mixer over a pack: state and convolution start anew at every document.

    Under context parallelism a rank convolves and scans its share of the heads over the whole pack.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cp = PackedMambaContext(
            cp_group=self.pg_collection.cp,
            d_inner_local_tp=self.d_inner_local_tp,
            nheads_local_tp=self.nheads_local_tp,
            ngroups_local_tp=self.ngroups_local_tp,
            d_state=self.d_state,
            conv1d_cp1=self.conv1d,
            dt_bias_cp1=self.dt_bias,
            A_log_cp1=self.A_log,
            D_cp1=self.D,
            D_has_hdim=self.D_has_hdim,
        )
        self.scan = scan_kernel(PLATFORM)

    def _ssm_training(
        self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """Convolve, scan, gate and norm.

        Args:
            zxBCdt: (L, B, C) output of the input projection.
            packed_seq_params: a `PackedSequence`, or None for one document a row.

        Returns:
            (L, B, D).
        """
        document_ids_BL = None
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedSequence)
            document_ids_BL = packed_seq_params.document_ids_BL
        y_BLD = self.scan(
            zxBCdt.transpose(0, 1).contiguous(),
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -torch.exp(self.cp.get_A_log().float()),
            D=self.cp.get_D(),
            chunk_size=self.chunk_size,
            activation=self.activation,
            headdim=self.headdim,
            ngroups=self.cp.ngroups_local_tpcp,
            norm_before_gate=self.norm_before_gate,
            seq_idx=document_ids_BL,
        )
        y_LBD = y_BLD.transpose(0, 1).contiguous()
        return self.norm(self.cp.post_conv_ssm(y_LBD, packed_seq_params))

    def _get_states_from_cache(
        self, inference_context: Any, batch_size: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """megatron-core's states of this layer, the scan's kept in float32.

        Rounded to bfloat16 at every token a state drifts; published serving keeps float32 too.
        """
        known = inference_context.key_value_memory_dict
        is_new = self.layer_number not in known
        convolution, state = super()._get_states_from_cache(inference_context, batch_size, **kwargs)
        if is_new:
            state = state.float()
            known[self.layer_number] = (convolution, state)
        return convolution, state


@dataclass
class HybridStackSubmodules(MambaStackSubmodules):
    """The layers of a hybrid stack and the norm that closes it."""

    final_norm: ModuleSpec | type = IdentityOp


class HybridStack(MambaStack):
    """megatron-core's Mamba stack with the final norm of its layer spec.

    Raises:
        ValueError: the layers built over all pipeline ranks are not the pattern's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_process: bool = True,
        hybrid_override_pattern: str = "",
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config,
            submodules,
            post_process=post_process,
            post_layer_norm=False,
            hybrid_override_pattern=hybrid_override_pattern,
            pg_collection=pg_collection,
            **kwargs,
        )
        self.post_layer_norm = True
        if post_process:
            self.final_norm = build_module(
                submodules.final_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
        self._refuse_lost_layers(hybrid_override_pattern)

    def _refuse_lost_layers(self, pattern: str) -> None:
        ranks = self.pp_group.size()
        first = self.config.num_layers_in_first_pipeline_stage
        if first is None:
            built = len(pattern) // ranks * ranks
        else:
            built = first + (len(pattern) - first) // (ranks - 1) * (ranks - 1)
        if built != len(pattern):
            nearest = nearest_first_stage(len(pattern), ranks).strip()
            raise ValueError(
                f"{len(pattern)} layers over {ranks} pipeline ranks would build {built}; set "
                f"parallel.first_stage_layers={nearest} so that the others share the rest evenly"
            )

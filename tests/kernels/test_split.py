"""The training entry: its parts put together by hand, and transformers' Mamba-2 layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.kernels.ssd import mamba_split_conv1d_scan_combined
from tests.kernels.recurrence import Case, relative, scan

HEADS, HEAD_DIM, GROUPS, STATE = 4, 8, 2, 8
INNER, SHARED = HEADS * HEAD_DIM, GROUPS * STATE


def draw(dtype: torch.dtype, length: int = 70) -> dict[str, Tensor]:
    torch.manual_seed(0)
    conv = INNER + 2 * SHARED
    shapes = {
        "zxbcdt": (2, length, INNER + conv + HEADS),
        "conv1d_weight": (conv, 4),
        "conv1d_bias": (conv,),
        "dt_bias": (HEADS,),
        "A_log": (HEADS,),
        "D": (HEADS,),
        "rmsnorm_weight": (INNER,),
        "outproj_weight": (12, INNER),
        "outproj_bias": (12,),
    }
    return {n: torch.randn(s).to(dtype).requires_grad_() for n, s in shapes.items()}


def by_hand(p: dict[str, Tensor], ids: Tensor, norm: bool, before: bool) -> Tensor:
    """Split, convolve per document, scan token by token, gate, norm, project."""
    z, xBC, dt = p["zxbcdt"].split([INNER, INNER + 2 * SHARED, HEADS], -1)
    taps = []
    for lag in range(4):
        shifted = F.pad(xBC, (0, 0, lag, 0))[:, : xBC.shape[1]]
        same = F.pad(ids, (lag, 0), value=-1)[:, : ids.shape[1]] == ids
        taps.append(shifted * same[..., None] * p["conv1d_weight"][:, 3 - lag])
    x, B, C = F.silu(sum(taps) + p["conv1d_bias"]).split([INNER, SHARED, SHARED], -1)
    heads = z.unflatten(-1, (HEADS, HEAD_DIM))
    case = Case(
        x.unflatten(-1, (HEADS, HEAD_DIM)),
        dt,
        p["A_log"],
        B.unflatten(-1, (GROUPS, STATE)),
        C.unflatten(-1, (GROUPS, STATE)),
        p["D"],
        torch.full_like(heads, 1.0) if norm else heads,
        p["dt_bias"],
        x.new_zeros(2, HEADS, HEAD_DIM, STATE),
        ids,
    )
    y = scan(case)[0].flatten(2)
    if not norm:
        return y
    y = y / F.silu(torch.tensor(1.0, dtype=y.dtype))
    y = y if before else y * F.silu(z)
    groups = y.unflatten(-1, (GROUPS, -1))
    y = (groups * (groups.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).flatten(-2)
    y = y * p["rmsnorm_weight"] * (F.silu(z) if before else 1)
    return y @ p["outproj_weight"].T + p["outproj_bias"]


@pytest.mark.parametrize(("norm", "before"), [(False, True), (True, True), (True, False)])
def test_it_equals_its_parts(norm: bool, before: bool) -> None:
    ids = (torch.arange(70) // 23).to(torch.int32).expand(2, -1)
    exact, ours = draw(torch.float64), draw(torch.float32)
    names = [n for n in ours if norm or n[:3] not in ("rms", "out")]
    extras = {
        n: ours[n] if norm else None for n in ("rmsnorm_weight", "outproj_weight", "outproj_bias")
    }
    y = mamba_split_conv1d_scan_combined(
        ours["zxbcdt"],
        ours["conv1d_weight"],
        ours["conv1d_bias"],
        ours["dt_bias"],
        -torch.exp(ours["A_log"]),
        ours["D"],
        chunk_size=16,
        seq_idx=ids,
        headdim=HEAD_DIM,
        ngroups=GROUPS,
        norm_before_gate=before,
        **extras,  # type: ignore[arg-type]
    )
    assert isinstance(y, Tensor)
    reference = by_hand(exact, ids, norm, before)
    assert relative(y, reference) <= 1e-5
    weight = torch.randn_like(y)
    grads = torch.autograd.grad(y, [ours[n] for n in names], weight)
    exact_grads = torch.autograd.grad(reference, [exact[n] for n in names], weight.double())
    for name, grad, other in zip(names, grads, exact_grads, strict=True):
        assert relative(grad, other) <= 1e-5, name


def test_it_equals_the_layer_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        hidden_size=24,
        mamba_num_heads=HEADS,
        mamba_head_dim=HEAD_DIM,
        n_groups=GROUPS,
        ssm_state_size=STATE,
        conv_kernel=4,
        chunk_size=16,
        hybrid_override_pattern="M",
        layer_norm_epsilon=1e-5,
        time_step_min=0.0,
    )
    torch.manual_seed(0)
    layer = modeling.NemotronHMamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in (layer.A_log, layer.D, layer.dt_bias, layer.norm.weight):
            parameter.copy_(torch.randn_like(parameter))
    hidden = torch.randn(2, 50, 24)
    parameters = list(layer.parameters())
    reference = layer(hidden)
    y = mamba_split_conv1d_scan_combined(
        layer.in_proj(hidden),
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        layer.dt_bias,
        -torch.exp(layer.A_log),
        layer.D,
        chunk_size=16,
        rmsnorm_weight=layer.norm.weight,
        rmsnorm_eps=1e-5,
        outproj_weight=layer.out_proj.weight,
        outproj_bias=layer.out_proj.bias,
        headdim=HEAD_DIM,
        ngroups=GROUPS,
        norm_before_gate=False,
    )
    assert isinstance(y, Tensor)
    assert relative(y, reference) <= 1e-5
    weight = torch.randn_like(y)
    grads = torch.autograd.grad(y, parameters, weight)
    others = torch.autograd.grad(reference, parameters, weight)
    for one, other in zip(grads, others, strict=True):
        assert relative(one, other) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": None}, "headdim"),
        ({"headdim": 4}, "gated MLP"),
        ({"ngroups": 3}, "3 groups"),
        ({"outproj_bias": torch.ones(3)}, "without outproj_weight"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    p = draw(torch.float32, 8)
    arguments: dict[str, object] = {
        n: p[n] for n in ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "D")
    }
    arguments |= {"A": -torch.ones(HEADS), "headdim": HEAD_DIM, "ngroups": GROUPS}
    with pytest.raises(ValueError, match=message):
        mamba_split_conv1d_scan_combined(**(arguments | change))  # type: ignore[arg-type]

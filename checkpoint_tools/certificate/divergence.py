"""How far a quantized release's answers are from the BF16 release's, over held-out packs.

Both sides are this project's model in float32: once with the checkpoint's weights rounded to
bfloat16, once with the weights that lie in the release, decoded, and the inputs of their products
quantized as a kernel would with the scales that lie there. Measured
are the places the model is trained to answer at, at most `MOST_PLACES`, evenly spread over
the packs: mean divergence KL(BF16 || quantized) and the share of places with the same first choice.

Costs one model in memory at a time, two passes, and the logits of those places on the host.
"""

import gc
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from checkpoint_tools.certificate.check import Bounds, Findings
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.decode import fake_quantized, input_scale
from checkpoint_tools.quantized_layout import FP8
from checkpoint_tools.reference import Weights, quantized_linears, reference_model
from megatron_vl.config.schema import Precision
from megatron_vl.data.pack import Pack
from megatron_vl.train.calibrate import exchanged_inputs, pack_logits, planned_packs

MOST_PLACES = 4096
_FEWEST_PLACES = 32
_CLEAR_LEAD = 0.1
"""Lead of BF16's first choice over its second, in nats, from which a place counts as decided."""


def check_divergence(
    subject: Subject, bounds: Bounds, findings: Findings, report: Callable[[str], None]
) -> None:
    """Divergence and agreement of a quantized release."""
    assert subject.chosen is not None
    packs = list(planned_packs(subject.source.config, "val", bounds.packs))
    places = [_answered(pack, MOST_PLACES // max(len(packs), 1)) for pack in packs]
    count = sum(len(one) for one in places)
    if count < _FEWEST_PLACES:
        findings.not_run["kl"] = f"{count} held-out places to answer at, {_FEWEST_PLACES} needed"
        return
    report(f"divergence: {count} places of {len(packs)} held-out packs, in bfloat16")
    bf16 = _all_logits(subject, subject.rounded, packs, places)
    report("divergence: quantized")
    scales = _input_scales(subject)
    quantized = _all_logits(subject, subject.persisted, packs, places, scales)
    total, same, decided, same_decided = 0.0, 0, 0, 0
    for one, other in zip(bf16, quantized, strict=True):
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        agrees = one.argmax(-1) == other.argmax(-1)
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        clear = first - second > _CLEAR_LEAD
        same, decided = same + int(agrees.sum()), decided + int(clear.sum())
        same_decided += int((agrees & clear).sum())
    of_fp8 = subject.format == FP8
    most, least = (
        (bounds.kl_fp8, bounds.top1_fp8) if of_fp8 else (bounds.kl_nvfp4, bounds.top1_nvfp4)
    )
    kl, top1 = total / count, same / count
    findings.figures["divergence"] = {
        "places": count,
        "packs": len(packs),
        "tokens": sum(pack.num_tokens for pack in packs),
        "undecided_share": 1 - decided / count,
        "top1_where_decided": same_decided / max(decided, 1),
    }
    says = "" if kl <= most else f"answers diverge from BF16 by {kl:.3g} nats a token"
    findings.add("kl", kl <= most, kl, most, says)
    says = "" if top1 >= least else f"{1 - top1:.1%} of the first choices are others"
    findings.add("top1", top1 >= least, top1, least, says)


def _answered(pack: Pack, most: int) -> Tensor:
    """Places whose next token is trained on, evenly thinned to `most`."""
    places = pack.loss_weights_L.nonzero().flatten()
    if len(places) <= most:
        return places
    return places[torch.linspace(0, len(places) - 1, most).long()]


def _all_logits(
    subject: Subject,
    weights: Weights,
    packs: Sequence[Pack],
    places: Sequence[Tensor],
    scales: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Logits of the chosen places of each pack, (places, vocabulary).

    Args:
        scales: of the inputs that are quantized, by linear.
    """
    chosen, rows = subject.chosen, subject.source.config.model.vocab_size
    assert chosen is not None
    quantized = scales or {}

    def exchange(name: str, given: Tensor) -> Tensor:
        return fake_quantized(given, quantized[name].to(given.device), chosen)

    found = []
    with (
        reference_model(subject.source, weights, Precision.fp32) as module,
        exchanged_inputs(module, quantized, exchange),
    ):
        for pack, wanted in zip(packs, places, strict=True):
            found.append(pack_logits(module, pack, wanted)[:, :rows].float().cpu())
    gc.collect()
    return found


def _input_scales(subject: Subject) -> dict[str, Tensor]:
    """Input scale of each quantized linear by module name, as the release holds it."""
    assert subject.chosen is not None
    scales = {}
    for name, rule in quantized_linears(subject.table).items():
        module = rule.published[0].name.removesuffix(".weight")
        held = {
            tensor: subject.published.read(tensor)
            for tensor in subject.published.tensors
            if tensor.startswith(module + ".input")
        }
        scales[name] = input_scale(held, module, subject.chosen)
    return scales

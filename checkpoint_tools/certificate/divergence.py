"""How far a quantized release's answers are from a BF16 release's, over held-out packs.

Which BF16 release: the checkpoint's own, or, where the checkpoint is a distillation's student, its
teacher's (see `teacher`); the distance from the student's own weights is then a further figure.

Both sides are this project's model in float32: once with a checkpoint's weights rounded to
bfloat16, once with the weights that lie in the release, decoded, and the inputs of their products
quantized as a kernel would with the scales that lie there. Measured
are the places the model is trained to answer at, at most `MOST_PLACES`, evenly spread over
the packs: mean divergence KL(BF16 || quantized) and the share of places with the same first choice.

Costs one model in memory at a time, a pass for each side, and the logits of two on the host.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from checkpoint_tools.certificate.check import Bounds, Findings
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.certificate.teacher import distilled, teacher_of
from checkpoint_tools.decode import fake_quantized, input_scale
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.quantized_layout import FP8
from checkpoint_tools.reference import Weights, quantized_linears, reference_model
from checkpoint_tools.stage_source import StageSource
from megatron_vl.config.schema import Precision
from megatron_vl.data.pack import Pack
from megatron_vl.train.calibrate import exchanged_inputs, pack_logits, planned_packs

MOST_PLACES = 4096
_FEWEST_PLACES = 32
_CLEAR_LEAD = 0.1
"""Lead of BF16's first choice over its second, in nats, from which a place counts as decided."""


@dataclass(frozen=True)
class Distance:
    """Of one model's answers from a reference's.

    Attributes:
        kl: mean KL(reference || model). [nats a token]
        top1: share of places with the same first choice.
        undecided_share: share of places where the reference itself hardly prefers its first choice.
        top1_where_decided: `top1` over the other places.
    """

    kl: float
    top1: float
    undecided_share: float
    top1_where_decided: float


def check_divergence(
    subject: Subject, bounds: Bounds, findings: Findings, report: Callable[[str], None]
) -> None:
    """Divergence and agreement of a quantized release."""
    assert subject.chosen is not None
    own, reference = subject.source, subject.source
    if distilled(own):
        try:
            reference = teacher_of(own)
        except ConversionError as error:
            findings.add("teacher", False, "not found", "its digest", str(error))
            findings.not_run["kl, top1"] = "there is no teacher to compare with"
            return
        findings.add("teacher", True, reference.digest, own.state.parent)
    packs = list(planned_packs(own.config, "val", bounds.packs))
    places = [_answered(pack, MOST_PLACES // max(len(packs), 1)) for pack in packs]
    count = sum(len(one) for one in places)
    if count < _FEWEST_PLACES:
        findings.not_run["kl"] = f"{count} held-out places to answer at, {_FEWEST_PLACES} needed"
        return
    report(f"divergence: {count} places of {len(packs)} held-out packs, quantized")
    quantized = _all_logits(subject, packs, places, own, subject.persisted, _input_scales(subject))

    def from_bf16_of(source: StageSource) -> Distance:
        report(f"divergence: {source.state.stage} in bfloat16")
        return distance(_all_logits(subject, packs, places, source, subject.rounded), quantized)

    found = from_bf16_of(reference)
    name = f"the teacher, {reference.state.stage}" if reference is not own else "its own weights"
    findings.figures["divergence"] = {
        "from": f"{name} in bfloat16, checkpoint {reference.digest}",
        "places": count,
        "packs": len(packs),
        "tokens": sum(pack.num_tokens for pack in packs),
        "undecided_share": found.undecided_share,
        "top1_where_decided": found.top1_where_decided,
    }
    if reference is not own:
        findings.figures["divergence_from_own_weights"] = asdict(from_bf16_of(own))
    _judge(found, subject.format == FP8, name, bounds, findings)


def _judge(found: Distance, of_fp8: bool, name: str, bounds: Bounds, findings: Findings) -> None:
    """Hold a distance to its bounds.

    Args:
        name: of the reference, in words.
    """
    most, least = (
        (bounds.kl_fp8, bounds.top1_fp8) if of_fp8 else (bounds.kl_nvfp4, bounds.top1_nvfp4)
    )
    far = f"answers diverge from {name} in bfloat16 by {found.kl:.3g} nats a token"
    findings.add("kl", found.kl <= most, found.kl, most, "" if found.kl <= most else far)
    others = f"{1 - found.top1:.1%} of the first choices are not those of {name} in bfloat16"
    findings.add(
        "top1", found.top1 >= least, found.top1, least, "" if found.top1 >= least else others
    )


def distance(reference: Sequence[Tensor], model: Sequence[Tensor]) -> Distance:
    """How far a model is from a reference.

    Args:
        reference, model: logits of the same places, (places, vocabulary) a pack.
    """
    total, count, same, decided, same_decided = 0.0, 0, 0, 0, 0
    for one, other in zip(reference, model, strict=True):
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        agrees = one.argmax(-1) == other.argmax(-1)
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        clear = first - second > _CLEAR_LEAD
        count += len(one)
        same, decided = same + int(agrees.sum()), decided + int(clear.sum())
        same_decided += int((agrees & clear).sum())
    return Distance(
        total / count, same / count, 1 - decided / count, same_decided / max(decided, 1)
    )


def _answered(pack: Pack, most: int) -> Tensor:
    """Places whose next token is trained on, evenly thinned to `most`."""
    places = pack.loss_weights_L.nonzero().flatten()
    if len(places) <= most:
        return places
    return places[torch.linspace(0, len(places) - 1, most).long()]


def _all_logits(
    subject: Subject,
    packs: Sequence[Pack],
    places: Sequence[Tensor],
    source: StageSource,
    weights: Weights,
    scales: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Logits of the chosen places of each pack, (places, vocabulary).

    Args:
        source: whose stored weights `weights` is given.
        scales: of the inputs that are quantized, by linear.
    """
    chosen, rows = subject.chosen, subject.source.config.model.vocab_size
    assert chosen is not None
    quantized = scales or {}

    def exchange(name: str, given: Tensor) -> Tensor:
        return fake_quantized(given, quantized[name].to(given.device), chosen)

    found = []
    with (
        reference_model(source, weights, Precision.fp32) as module,
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

"""The release in transformers beside the checkpoint in this project: layers, logits, answers.

Both in float32. This project's model gets the checkpoint's weights, passed through the release's
rounding or quantizer; transformers' classes, through the shipped code, get what lies on disk. So a
layer that differs is a tensor, a name or a transform that is wrong, and the first one is named.
Quantized releases are compared as the numbers they stand for; what their activations lose is
measured by `divergence`.

One model is in memory at a time: answers and layer outputs of the first wait on the host.

Shapes: L tokens, B batch (1), H width, T tiles, P tokens of a tile, E encoder width.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_tools.certificate.check import Bounds, Findings
from checkpoint_tools.certificate.prompts import KINDS, Prompt, ours, theirs, without_pruning
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.reference import reference_model
from megatron_vl.config.schema import Precision
from megatron_vl.data.pack import Pack
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.layout import TEXT
from megatron_vl.train.calibrate import pack_logits

_ASKED = ("text", "image", "video")
"""Kinds that are answered."""


@dataclass
class Seen:
    """What one side gave for one prompt.

    Attributes:
        layers: outputs by layer in the order of computation, each (tokens, width), on the host.
        logits: after the last token, (vocabulary,).
        answer: greedy tokens.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    answer: list[int] = field(default_factory=list)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], seen: Seen) -> Iterator[None]:
    """Keep the output of each layer while the block runs."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            seen.layers[name] = tensor.detach().float().cpu()

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def check_parity(
    subject: Subject,
    prompts: Sequence[Prompt],
    processor: Any,
    bounds: Bounds,
    findings: Findings,
    report: Callable[[str], None],
) -> None:
    """Layers, logits, greedy answers, and that pictures matter."""
    first = {kind: next(p for p in prompts if p.kind == kind) for kind in KINDS}
    asked = {kind: first[kind] for kind in _ASKED}
    config = without_pruning(subject.source.config)
    packs = {kind: ours(config, prompt) for kind, prompt in asked.items()}
    report("parity: the checkpoint answers")
    with reference_model(subject.source, subject.as_released, Precision.fp32) as module:
        checkpoint = {k: _of_checkpoint(module, p, subject, bounds) for k, p in packs.items()}
    gc.collect()
    report("parity: the release answers in transformers")
    model = load_release(subject)
    release, replaced = {}, {}
    for kind, prompt in asked.items():
        given = theirs(processor, config, prompt)
        release[kind] = _of_release(model, given, bounds)
        if prompt.media:
            replaced[kind] = _logits_of(model, _other_pixels(given))
    _compare_layers(checkpoint, release, bounds, findings)
    for kind in _ASKED:
        _compare_answers(kind, checkpoint[kind], release[kind], bounds, findings)
    for kind, logits in replaced.items():
        change = worst(logits, release[kind].logits)
        says = "" if change >= bounds.replaced else f"the {kind} hardly moves the logits"
        findings.add(f"{kind}_matters", change >= bounds.replaced, change, bounds.replaced, says)


def load_release(subject: Subject) -> nn.Module:
    """The release as its readers open it, float32; a quantized one as the numbers it stands for.

    Raises:
        ValueError: transformers finds a tensor missing or over.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(subject.folder, trust_remote_code=True)
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    where: Any = subject.folder
    if subject.chosen is not None:
        del config.quantization_config
        options["state_dict"] = dict(subject.decoded())
        where = None
        config._name_or_path = str(subject.folder)
    model, loading = _opened(AutoModelForImageTextToText, subject, config, where, options)
    left = {key: sorted(map(str, value))[:4] for key, value in loading.items() if value}
    if left:
        raise ValueError(f"transformers loads {subject.folder.name} with {left}")
    return model.to(PLATFORM.device).eval()


def _opened(
    auto: Any, subject: Subject, config: Any, where: Any, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    if where is not None:
        return auto.from_pretrained(where, config=config, trust_remote_code=True, **options)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = config.auto_map["AutoModelForImageTextToText"]
    cls = get_class_from_dynamic_module(reference, str(subject.folder))
    return cls.from_pretrained(None, config=config, **options)


def worst(one: Tensor, other: Tensor) -> float:
    """Largest difference, of values whose largest is 1."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _of_checkpoint(
    module: VisionLanguageModel, pack: Pack, subject: Subject, bounds: Bounds
) -> Seen:
    """This project's side; greedy without caches, one whole pass a token."""
    seen, rows = Seen(), subject.source.config.model.vocab_size
    stack: Any = module.language_model.decoder
    encoder: Any = module.vision_model.decoder
    layers = {f"encoder layer {n}": layer for n, layer in enumerate(encoder.layers)}
    layers["projector"] = module.vision_projection
    layers |= {f"decoder layer {n}": layer for n, layer in enumerate(stack.layers)}
    with _watched(layers, seen):
        seen.logits = _last(module, pack, [])[:rows]
    seen.layers = {name: _ours_flat(name, value) for name, value in seen.layers.items()}
    for _ in range(bounds.new_tokens):
        seen.answer.append(int(_last(module, pack, seen.answer)[:rows].argmax()))
    return seen


def _ours_flat(name: str, output: Tensor) -> Tensor:
    """(P, T, E) of the encoder and (tokens, 1, width) of the others to (tokens, width)."""
    if name.startswith("encoder"):
        output = output.transpose(0, 1)
    return output.flatten(0, 1)


def _last(module: VisionLanguageModel, prompt: Pack, new: list[int]) -> Tensor:
    """Logits after the last token, float32 on the host."""
    length = prompt.tokens_L.shape[0] + len(new)
    longer = replace(
        prompt,
        tokens_L=torch.cat([prompt.tokens_L, torch.tensor(new, dtype=torch.int64)]),
        document_ids_L=torch.zeros(length, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        document_lengths=(length,),
        max_document_length=length,
        visual_rows_L=F.pad(prompt.visual_rows_L, (0, len(new)), value=TEXT),
    )
    return pack_logits(module, longer, torch.tensor([length - 1]))[0].float().cpu()


@torch.no_grad()
def _of_release(model: Any, given: Mapping[str, Tensor], bounds: Bounds) -> Seen:
    seen = Seen()
    encoder = model.vision_model.encoder.layer
    layers = {f"encoder layer {n}": layer for n, layer in enumerate(encoder)}
    layers["projector"] = model.mlp1
    decoder = model.language_model.model.layers
    layers |= {f"decoder layer {n}": layer for n, layer in enumerate(decoder)}
    with _watched(layers, seen):
        seen.logits = _logits_of(model, given)
    seen.layers = {name: value.flatten(0, -2) for name, value in seen.layers.items()}
    inputs = {name: value.to(PLATFORM.device) for name, value in given.items()}
    many = bounds.new_tokens
    said = model.generate(**inputs, max_new_tokens=many, min_new_tokens=many, eos_token_id=-1)
    seen.answer = said[0, inputs["input_ids"].shape[1] :].tolist()
    return seen


@torch.no_grad()
def _logits_of(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value.to(PLATFORM.device) for name, value in given.items()}
    return model(**inputs).logits[0, -1].float().cpu()


def _other_pixels(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same prompt with its pictures mirrored and inverted."""
    return {**given, "pixel_values": -given["pixel_values"].flip(-1)}


def _compare_layers(
    checkpoint: Mapping[str, Seen],
    release: Mapping[str, Seen],
    bounds: Bounds,
    findings: Findings,
) -> None:
    """Every layer of every prompt; the first that differs, and the worst, are named."""
    measured: dict[str, float] = {}
    for kind, ours_seen in checkpoint.items():
        for name, value in ours_seen.layers.items():
            gap = worst(release[kind].layers[name], value)
            measured[name] = max(measured.get(name, 0.0), gap)
    names = sorted(measured, key=lambda name: (_ORDER[name.split()[0]], _number(name)))
    diverging = [name for name in names if not measured[name] <= bounds.layers]
    says = ""
    if diverging:
        first = diverging[0]
        says = f"the first diverging layer is {first}, by {measured[first]:.3g}"
    findings.add("layers", not diverging, max(measured.values()), bounds.layers, says)
    findings.figures["layers"] = {name: measured[name] for name in names}
    gap = max(
        worst(release[kind].logits[: len(seen.logits)], seen.logits)
        for kind, seen in checkpoint.items()
    )
    says = "" if gap <= bounds.layers else "the logits differ" + (f"; {says}" if says else "")
    findings.add("logits", gap <= bounds.layers, gap, bounds.layers, says)


_ORDER = {"encoder": 0, "projector": 1, "decoder": 2}


def _number(name: str) -> int:
    last = name.split()[-1]
    return int(last) if last.isdigit() else 0


def _compare_answers(
    kind: str, checkpoint: Seen, release: Seen, bounds: Bounds, findings: Findings
) -> None:
    pairs = zip(checkpoint.answer, release.answer, strict=False)
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(release.answer))
    many = bounds.new_tokens
    says = "" if equal == many else f"token {equal} of the answer differs"
    findings.add(f"greedy_{kind}", equal == many, f"{equal} of {many} tokens equal", many, says)

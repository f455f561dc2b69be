"""Exactness in bfloat16 on one GPU: documents of a pack do not see each other, recomputation
changes no bit, and a document in a pack is the document alone.

With the project's torch kernels isolation is bitwise; with mamba_ssm's Triton scan, where that is
installed, it holds to rounding, and how far is printed. Layouts of several ranks need several GPUs:
`mvl check`.
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.measure import Row, device, relative
from bench.gpu.model import drawn_model, groups_of, stage, world
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine import platform
from megatron_vl.engine.hybrid_stack import PackedMambaMixer, scan_kernel
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.layout import aligned
from megatron_vl.train.synthetic import pack_of, samples_of


def logits(model: VisionLanguageModel, pack: Pack) -> Tensor:
    """(L, vocabulary) of a pack."""
    documents = packed_sequence(
        pack.document_ids_L, pack.cu_seqlens, pack.max_document_length, device()
    )
    tokens_BL = pack.tokens_L.to(device()).unsqueeze(0)
    return model(tokens_BL, visual_input(pack, device()), documents)[0]


def gradients(model: VisionLanguageModel, pack: Pack) -> dict[str, Tensor]:
    """Gradient of every parameter for the sum of the pack's weighted losses."""
    documents = packed_sequence(
        pack.document_ids_L, pack.cu_seqlens, pack.max_document_length, device()
    )
    losses_BL = model(
        pack.tokens_L.to(device()).unsqueeze(0),
        visual_input(pack, device()),
        documents,
        labels_BL=pack.labels_L.to(device()).unsqueeze(0),
    )
    model.zero_grad(set_to_none=True)
    (losses_BL[0] * pack.loss_weights_L.to(device())).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def main(smoke: bool) -> None:
    """Check with each scan this machine has."""
    length = 512 if smoke else 4096
    config = stage(smoke, "precision=bf16", f"data.sequence_length={length}")
    scans = {"torch kernels": replace(platform.PLATFORM, has_mamba_ssm=False)}
    if platform.PLATFORM.has_mamba_ssm:
        scans["mamba_ssm"] = platform.PLATFORM
    with world():
        for name, kernels in scans.items():
            with groups_of(config) as groups:
                model = drawn_model(config, groups)
                for mixer in model.modules():
                    if isinstance(mixer, PackedMambaMixer):
                        mixer.scan = scan_kernel(kernels)
                _isolation(name, model, config)
        _recompute(smoke, length)


def _isolation(name: str, model: VisionLanguageModel, config: StageConfig) -> None:
    """Change one document at a time: its tokens, then its pixels; look at the others."""
    pack = pack_of(config, samples_of(config, 0), name="exact")
    bounds = pack.cu_seqlens.tolist()
    with torch.no_grad():
        before = logits(model, pack)
        leaks, worst = 0, 0.0
        documents = range(len(pack.sample_keys))
        for number in documents:
            first, end = bounds[number], bounds[number + 1]
            tokens_L = pack.tokens_L.clone()
            tokens_L[first] = (tokens_L[first] + 1) % config.model.vocab_size
            after = logits(model, replace(pack, tokens_L=tokens_L))
            others = torch.ones(len(before), dtype=torch.bool, device=before.device)
            others[first:end] = False
            leaks += not torch.equal(before[others], after[others])
            worst = max(worst, relative(after[others], before[others]))
            assert not torch.equal(before[first:end], after[first:end])
        Row("exact", f"{name}, documents that move others", leaks, f"of {len(documents)}").say()
        Row("exact", f"{name}, by at most", worst, "relative").say()
        apart = 0.0
        for number, sample in enumerate(samples_of(config, 0)):
            length = aligned(len(sample.document), config.data.document_alignment)
            data = replace(config.data, sequence_length=length)
            alone = pack_of(replace(config, data=data), [sample], name="alone")
            span = slice(bounds[number], bounds[number] + len(sample.document))
            apart = max(apart, relative(before[span], logits(model, alone)[: len(sample.document)]))
        Row("exact", f"{name}, packed from alone", apart, "relative").say()


def _recompute(smoke: bool, length: int) -> None:
    """Gradients with every layer recomputed against gradients with none, torch kernels."""
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        config = stage(smoke, "precision=bf16", f"data.sequence_length={length}", recompute=again)
        with groups_of(config) as groups:
            model = drawn_model(config, groups).train()
            for mixer in model.modules():
                if isinstance(mixer, PackedMambaMixer):
                    mixer.scan = scan_kernel(replace(platform.PLATFORM, has_mamba_ssm=False))
            pack = pack_of(config, samples_of(config, 0), name="exact")
            found.append(gradients(model, pack))
    differ = sum(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    Row("exact", "gradients that recomputation changes", differ, f"of {len(found[0])}").say()


if __name__ == "__main__":
    main("--smoke" in sys.argv)

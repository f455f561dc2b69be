"""A changed token or pixel of one document never changes another: bitwise, in float32."""

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine.hybrid_stack import PackedMambaMixer
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.layout import Document
from tests.engine.test_attention import pack_of
from tests.support.packs import pack_of_documents, picture_documents, run_pack

# Boundaries inside and on chunk borders (64), a document shorter than the convolution, padding.
LENGTHS = (70, 58, 2, 90, 36)
TILES_OF_DOCUMENT = (2, 1, 0, 1, 0)
Drawn = tuple[list[Document], list[Tensor]]


@pytest.fixture(scope="module")
def drawn(config: StageConfig) -> Drawn:
    """Documents, and the tiles of those that have any."""
    generator = torch.Generator().manual_seed(41)
    return picture_documents(config, LENGTHS, TILES_OF_DOCUMENT, generator)


@pytest.fixture(scope="module")
def pack(config: StageConfig, drawn: Drawn) -> Pack:
    return pack_of_documents(config, *drawn)


def logits(model: VisionLanguageModel, pack: Pack) -> list[Tensor]:
    with torch.no_grad():
        return list(run_pack(model, pack).split(LENGTHS))


def changed_documents(before: list[Tensor], after: list[Tensor]) -> list[int]:
    return [
        number
        for number, (one, other) in enumerate(zip(before, after, strict=True))
        if not torch.equal(one, other)
    ]


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_a_token_changes_its_own_document_alone(
    model: VisionLanguageModel, config: StageConfig, pack: Pack, document: int
) -> None:
    """The first and the last token of the document, the ones beside its neighbours."""
    before = logits(model, pack)
    start = sum(LENGTHS[:document])
    for position in (start, start + LENGTHS[document] - 1):
        old = int(pack.tokens_L[position])
        pack.tokens_L[position] = (old + 1) % config.model.vocab_size
        after = logits(model, pack)
        pack.tokens_L[position] = old
        assert changed_documents(before, after) == [document]
        inside = position - start
        assert torch.equal(before[document][:inside], after[document][:inside])


@pytest.mark.parametrize("tile", range(sum(TILES_OF_DOCUMENT)))
def test_a_pixel_changes_its_own_document_alone(
    model: VisionLanguageModel, pack: Pack, tile: int
) -> None:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(TILES_OF_DOCUMENT))
    before = logits(model, pack)
    patch = tile * pack.grids[0].patches + 21
    old = int(pack.patches_PF[patch, 77])
    pack.patches_PF[patch, 77] = 255 - old
    after = logits(model, pack)
    pack.patches_PF[patch, 77] = old
    assert changed_documents(before, after) == [int(owner[tile])]


def test_a_document_alone_gives_what_it_gives_in_a_pack(
    model: VisionLanguageModel, config: StageConfig, drawn: Drawn, pack: Pack
) -> None:
    """To rounding: chunks of the scan fall elsewhere."""
    documents, tiles = drawn
    packed = logits(model, pack)
    with torch.no_grad():
        alone = run_pack(model, pack_of_documents(config, documents[1:2], tiles[1:2]))
    assert float((alone - packed[1]).norm() / packed[1].norm()) < 2e-6


@pytest.fixture(scope="module")
def mixer(model: VisionLanguageModel) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, PackedMambaMixer))


def test_mixer_and_its_gradients_stay_inside_a_document(
    mixer: nn.Module, config: StageConfig
) -> None:
    """The gradient of one document's output reaches no other document's input."""
    width = config.model.decoder.hidden_size
    generator = torch.Generator().manual_seed(43)
    hidden = torch.randn(sum(LENGTHS), 1, width, generator=generator)
    pack = pack_of(LENGTHS)

    def run(values: Tensor) -> list[Tensor]:
        return list(mixer(values, packed_seq_params=pack)[0].split(LENGTHS))

    given = hidden.clone().requires_grad_()
    before = run(given)
    before[1].square().sum().backward()
    reached = [bool(part.abs().sum() > 0) for part in given.grad.split(LENGTHS)]
    assert reached == [False, True, False, False, False]
    other = hidden.clone()
    other[sum(LENGTHS[:3]) :] += 1
    with torch.no_grad():
        assert changed_documents(before, run(other)) == [3, 4]
    alone = mixer(hidden[:70])[0]
    assert float((alone - before[0]).norm() / alone.norm()) < 2e-6


def test_mixer_without_a_pack_runs_one_document_through(
    mixer: nn.Module, config: StageConfig
) -> None:
    """With no description the whole row is one document, so the pack must give something else."""
    hidden = torch.randn(sum(LENGTHS), 1, config.model.decoder.hidden_size)
    with torch.no_grad():
        whole = mixer(hidden)[0]
        packed = mixer(hidden, packed_seq_params=pack_of(LENGTHS))[0]
    assert float((whole[:70] - packed[:70]).norm() / packed[:70].norm()) < 2e-6
    assert float((whole[70:] - packed[70:]).norm() / packed[70:].norm()) > 1e-3

"""A changed token or pixel of one document never changes another: bitwise, in float32."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.engine.hybrid_stack import PackedMambaMixer
from megatron_vl.model.vlm import VisionLanguageModel
from tests.engine.test_attention import pack_of

# Boundaries inside and on chunk borders (64), a document shorter than the convolution, padding.
LENGTHS = (70, 58, 2, 90, 36)
TILES_OF_DOCUMENT = (2, 1, 0, 1, 0)
PER_TILE = 16


@dataclass(frozen=True)
class Drawn:
    """A pack: tokens (L), tiles (T, 3, S, S), where visual embeddings go (V)."""

    tokens_L: Tensor
    tiles_TCHW: Tensor
    positions_V: Tensor


@pytest.fixture(scope="module")
def drawn(config: StageConfig) -> Drawn:
    generator = torch.Generator().manual_seed(41)
    edge = config.data.tile_size
    positions, start = [], 0
    for length, tiles in zip(LENGTHS, TILES_OF_DOCUMENT, strict=True):
        positions.append(torch.arange(start + 3, start + 3 + tiles * PER_TILE))
        start += length
    return Drawn(
        torch.randint(0, config.model.vocab_size, (sum(LENGTHS),), generator=generator),
        torch.randint(
            0, 256, (sum(TILES_OF_DOCUMENT), 3, edge, edge), dtype=torch.uint8, generator=generator
        ),
        torch.cat(positions),
    )


def logits(model: VisionLanguageModel, drawn: Drawn) -> list[Tensor]:
    with torch.no_grad():
        whole = model(
            drawn.tokens_L.unsqueeze(0), drawn.tiles_TCHW, drawn.positions_V, pack_of(LENGTHS)
        )
    return list(whole[0].split(LENGTHS))


def changed_documents(before: list[Tensor], after: list[Tensor]) -> list[int]:
    return [
        number
        for number, (one, other) in enumerate(zip(before, after, strict=True))
        if not torch.equal(one, other)
    ]


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_a_token_changes_its_own_document_alone(
    model: VisionLanguageModel, config: StageConfig, drawn: Drawn, document: int
) -> None:
    """The first and the last token of the document, the ones beside its neighbours."""
    before = logits(model, drawn)
    start = sum(LENGTHS[:document])
    for position in (start, start + LENGTHS[document] - 1):
        tokens = drawn.tokens_L.clone()
        tokens[position] = (tokens[position] + 1) % config.model.vocab_size
        after = logits(model, replace(drawn, tokens_L=tokens))
        assert changed_documents(before, after) == [document]
        inside = position - start
        assert torch.equal(before[document][:inside], after[document][:inside])


@pytest.mark.parametrize("tile", range(sum(TILES_OF_DOCUMENT)))
def test_a_pixel_changes_its_own_document_alone(
    model: VisionLanguageModel, drawn: Drawn, tile: int
) -> None:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(TILES_OF_DOCUMENT))
    tiles = drawn.tiles_TCHW.clone()
    tiles[tile, 1, 17, 40] = 255 - tiles[tile, 1, 17, 40]
    after = logits(model, replace(drawn, tiles_TCHW=tiles))
    assert changed_documents(logits(model, drawn), after) == [int(owner[tile])]


def test_a_document_alone_gives_what_it_gives_in_a_pack(
    model: VisionLanguageModel, drawn: Drawn
) -> None:
    """To rounding: chunks of the scan fall elsewhere."""
    packed = logits(model, drawn)
    tokens = drawn.tokens_L[70:128]
    with torch.no_grad():
        alone = model(
            tokens.unsqueeze(0), drawn.tiles_TCHW[2:3], torch.arange(3, 19), pack_of((58,))
        )
    assert float((alone[0] - packed[1]).norm() / packed[1].norm()) < 2e-6


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

"""Cached decoding against running the whole sequence again, and against transformers' generate."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.infer.model import OpenModel
from megatron_vl.model.cache import DecodingCache
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.counts import evs_kept
from megatron_vl.sequence.layout import Document
from megatron_vl.sequence.visual import VideoSpan, reserved_counts
from tests.support.packs import (
    pack_of_documents,
    picture_documents,
    run_pack,
    text_document,
    tile_grid_of,
)
from tests.support.their_decoder import their_decoder

NEW_TOKENS = 6


def prompts(config: StageConfig) -> dict[str, Pack]:
    """Random prompts: text shorter than a convolution and longer than two chunks, pictures, and a
    video of which most is pruned."""
    generator = torch.Generator().manual_seed(71)
    made = {}
    for name, length, tiles in [
        ("two tokens", 2, 0),
        ("text", 150, 0),
        ("one picture", 60, 2),
        ("many tiles", 130, 7),
    ]:
        documents, pictures = picture_documents(config, [length], [tiles], generator)
        made[name] = pack_of_documents(config, documents, pictures)
    made["pruned video"] = video_prompt(config, generator)
    return made


def video_prompt(config: StageConfig, generator: torch.Generator) -> Pack:
    grid, frames = tile_grid_of(config), 5
    kept = evs_kept(frames, grid.tokens, 0.6)
    labels = [torch.randint(0, 2000, (3 + n,), generator=generator).tolist() for n in range(frames)]
    span = VideoSpan(
        start=4,
        grid=grid,
        before_F=tuple(len(label) + 1 for label in labels),
        after_F=(1,) * frames,
        kept=kept,
    )
    tokens = torch.randint(0, 2000, (4,), generator=generator).tolist()
    for label, count in zip(labels, reserved_counts(frames, grid.tokens, kept), strict=True):
        tokens += [*label, 7, *[8] * count, 9]
    tokens += torch.randint(0, 2000, (11,), generator=generator).tolist()
    document = text_document(tokens)
    document = Document(document.tokens_N, document.turn_ids_N, (span,))
    edge = config.data.tile_size
    # Frames that change here and there, so that what is kept is a choice.
    pixels = torch.randint(0, 256, (3, edge, edge), dtype=torch.uint8, generator=generator)
    clip = pixels.repeat(frames, 1, 1, 1)
    for frame in range(1, frames):
        clip[frame:, :, : 8 * frame] = torch.randint(
            0, 256, (3, 8 * frame, edge), dtype=torch.uint8, generator=generator
        )
    return pack_of_documents(config, [document], [clip])


@pytest.mark.parametrize(
    "name", ["two tokens", "text", "one picture", "many tiles", "pruned video"]
)
def test_a_cached_step_is_the_whole_sequence_run_again(
    model: VisionLanguageModel, config: StageConfig, name: str
) -> None:
    """Logits after the prompt and after each of the greedy tokens: 1e-5, float32."""
    prompt = prompts(config)[name]
    cache = DecodingCache(model, prompt.num_tokens + NEW_TOKENS)
    cached_V = cache.prefill(prompt)
    with torch.no_grad():
        whole_V = run_pack(model, prompt)[-1]
    assert float((cached_V - whole_V).abs().max()) < 1e-5
    chosen: list[int] = []
    for _ in range(NEW_TOKENS):
        chosen.append(int(cached_V.argmax()))
        cached_V = cache.push(chosen[-1])
        whole_V = uncached(model, prompt, chosen)
        assert float((cached_V - whole_V).abs().max()) < 1e-5
        assert int(cached_V.argmax()) == int(whole_V.argmax())
    assert cache.num_tokens == prompt.num_tokens + NEW_TOKENS


def uncached(model: VisionLanguageModel, prompt: Pack, new: list[int]) -> torch.Tensor:
    opened = OpenModel(model, StageConfig())
    opened.config.model.vocab_size = model.language_model.vocab_size
    return opened.last_logits(prompt, new)


def test_a_cache_depends_on_what_it_has_seen(
    model: VisionLanguageModel, config: StageConfig
) -> None:
    """Attention, convolution and state each: a changed early token moves every later step."""
    generator = torch.Generator().manual_seed(72)
    tokens = torch.randint(0, 2000, (40,), generator=generator).tolist()
    changed = [tokens[0] + 1, *tokens[1:]]
    results = []
    for one in (tokens, changed):
        cache = DecodingCache(model, 60)
        results.append([cache.prefill(pack_of_documents(config, [text_document(one)], []))])
        results[-1] += [cache.push(5) for _ in range(8)]
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).abs().max()) > 1e-4
    assert all(not torch.equal(a, b) for a, b in pairwise(results[0]))


def test_a_full_cache_says_so(model: VisionLanguageModel, config: StageConfig) -> None:
    prompt = pack_of_documents(config, [text_document([1, 2, 3])], [])
    cache = DecodingCache(model, 4)
    cache.prefill(prompt)
    cache.push(4)
    with pytest.raises(ValueError, match="5 tokens do not fit the 4"):
        cache.push(5)
    with pytest.raises(ValueError, match="3 tokens do not fit the 2"):
        DecodingCache(model, 2).prefill(prompt)


def test_greedy_tokens_are_those_of_transformers_generate(
    model: VisionLanguageModel, config: StageConfig
) -> None:
    """32 tokens after random prompts; transformers decodes with its own cache."""
    nemotron_h: Any = their_decoder(model, config)
    generator = torch.Generator().manual_seed(73)
    for length in (3, 90):
        tokens = torch.randint(0, 2000, (length,), generator=generator)
        prompt = pack_of_documents(config, [text_document(tokens.tolist())], [])
        cache = DecodingCache(model, length + 32)
        logits_V, ours = cache.prefill(prompt), []
        for _ in range(32):
            ours.append(int(logits_V.argmax()))
            logits_V = cache.push(ours[-1])
        theirs = nemotron_h.generate(
            tokens.unsqueeze(0),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            use_cache=True,
        )
        assert ours == theirs[0, length:].tolist()
        assert len(set(ours)) > 4

"""Cached decoding of a bfloat16 model: the scan's state is not rounded."""

import pytest
import torch

from megatron_vl.config.load import load_stage
from megatron_vl.infer.model import OpenModel
from megatron_vl.model.cache import DecodingCache
from tests.conftest import LAPTOP
from tests.support.models import perturbed_model
from tests.support.packs import pack_of_documents, text_document


def test_states_stay_in_float32() -> None:
    config = load_stage(LAPTOP / "stage1.yaml", ["parallel.data=1", "precision=bf16"])
    with perturbed_model(config) as module:
        cache = DecodingCache(module, 60)
        prompt = pack_of_documents(config, [text_document(list(range(40, 60)))], [])
        cache.prefill(prompt)
        new = list(range(300, 330))
        for token in new:
            cached_V = cache.push(token)
        states = cache._context.key_value_memory_dict
        kinds = dict(enumerate(config.model.decoder.pattern, start=1))
        for layer, (first, second) in states.items():
            expected = torch.float32 if kinds[layer] == "M" else torch.bfloat16
            assert (first.dtype, second.dtype) == (torch.bfloat16, expected)
        assert {kinds[layer] for layer in states} == {"M", "*"}
        whole_V = OpenModel(module, config).last_logits(prompt, new)
    # Of logits of about 0.4; bfloat16 arithmetic alone puts them 0.01 apart.
    assert float((cached_V[: len(whole_V)] - whole_V).abs().max()) == pytest.approx(0, abs=0.03)

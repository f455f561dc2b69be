"""How tokens are drawn, against frequencies and an independent reading of top-k and top-p."""

import pytest
import torch

from megatron_vl.infer.sampling import Sampler, Sampling, kept_probabilities
from megatron_vl.infer.thinking import Thinking

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])


def test_no_temperature_takes_the_likeliest() -> None:
    assert {Sampler(Sampling(seed=seed)).choose(LOGITS) for seed in range(5)} == {0}


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=0.7, seed=3))
    drawn = torch.tensor([sampler.choose(LOGITS) for _ in range(4000)])
    found = torch.bincount(drawn, minlength=len(LOGITS)) / len(drawn)
    expected = torch.softmax(LOGITS / 0.7, -1)
    assert float((found - expected).abs().max()) < 0.03


def test_the_seed_alone_decides() -> None:
    def row(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert row(1) == row(1)
    assert row(1) != row(2)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 6, 50])
def test_top_k_and_top_p_keep_what_they_say(top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(int(1000 * top_p) + top_k)
    logits = torch.randn(40, generator=generator).double()
    ranked = sorted(range(40), key=lambda token: -float(logits[token]))[: top_k or 40]
    weights = [float(torch.exp(logits[token] / 0.6)) for token in ranked]
    kept, reached = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if reached >= top_p * sum(weights):
            break
        kept.append((token, weight))
        reached += weight
    expected = torch.zeros(40, dtype=torch.float64)
    for token, weight in kept:
        expected[token] = weight / reached
    sampling = Sampling(temperature=0.6, top_p=top_p, top_k=top_k)
    assert torch.allclose(kept_probabilities(logits, sampling), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "the least is 0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.2}, "above 0 and at most 1"),
        ({"top_k": -1}, "the least is 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_a_trace_may_use_its_whole_budget() -> None:
    thinking = Thinking(budget=10, grace=5)
    assert [thinking.closing(count, "\n") for count in (1, 10)] == ["", ""]
    assert thinking.closing(11, "word") == ""


def test_the_first_line_end_after_the_budget_closes_a_trace() -> None:
    thinking = Thinking(budget=10, grace=5)
    assert thinking.closing(11, ".\n") == "</think>\n\n"
    assert thinking.closing(13, "\n  ") == "\n</think>\n\n"


def test_a_trace_without_a_line_end_is_broken_off() -> None:
    thinking = Thinking(budget=10, grace=5)
    assert thinking.closing(14, "word") == ""
    assert thinking.closing(15, "word") == ".\n</think>\n\n"
    assert Thinking(budget=10).closing(509, "word") == ""
    assert Thinking(budget=10).closing(510, "word") != ""


def test_no_budget_never_closes() -> None:
    assert Thinking().closing(10**6, "\n") == ""
    with pytest.raises(ValueError, match="the least is 0"):
        Thinking(budget=-1)

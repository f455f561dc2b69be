"""Sizes and metrics as `explain` and the model card word them."""

import pytest

from checkpoint_tools.wording import Evaluation, evaluations, other_metrics, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(812, "812 B"), (2_937_111, "2.94 MB"), (999_600, "1 MB"), (24_620_002_304, "24.6 GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


def test_losses_are_sorted_by_set_and_part() -> None:
    metrics = {
        "eval/val": 2.5,
        "eval/val/source/qa": 1.25,
        "eval/val/modality/image": 1.5,
        "eval/old/source/text": 4.0,
        "loss": 0.01,
        "data/samples": {"qa": 3},
    }
    assert evaluations(metrics) == {
        "val": Evaluation(2.5, {"qa": 1.25}, {"image": 1.5}),
        "old": Evaluation(None, {"text": 4.0}, {}),
    }
    assert other_metrics(metrics) == {"loss": 0.01, "data/samples": {"qa": 3}}

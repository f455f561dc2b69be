"""Result files of other tools in the shapes they write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.run.result_files import ResultError, merge, read_results


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_vlmevalkit(tmp_path: Path) -> None:
    """Tables with one split, tables with several rows, score objects; beside them predictions."""
    folder = tmp_path / "outputs" / "MyVL" / "T20251103_G1a2b"
    write(
        folder / "MyVL_MMBench_DEV_EN_acc.csv",
        '"split","Overall","AR","LR"\n"dev","81.443298","84.0","61.5"\n',
    )
    write(
        folder / "MyVL_HallusionBench_score.csv",
        '"split","aAcc","fAcc"\n"Overall","61.93","36.99"\n"VD","56.85","35.21"\n',
    )
    write(
        folder / "MyVL_OCRBench_score.json",
        {"Text Recognition": 240, "Scene Text-centric VQA": 171, "Final Score": 801},
    )
    write(
        folder / "MyVL_Video-MME_64frame_subs_rating.json",
        {"short": {"overall": "0.65", "domain": {"Sports": "0.5"}}, "overall": {"overall": "0.61"}},
    )
    write(folder / "MyVL_MMBench_DEV_EN.csv", '"index","prediction"\n"1","A"\n')
    expected = {
        "MMBench_DEV_EN.Overall": 81.443298,
        "MMBench_DEV_EN.AR": 84.0,
        "MMBench_DEV_EN.LR": 61.5,
        "HallusionBench.Overall.aAcc": 61.93,
        "HallusionBench.Overall.fAcc": 36.99,
        "HallusionBench.VD.aAcc": 56.85,
        "HallusionBench.VD.fAcc": 35.21,
        "OCRBench.Text_Recognition": 240.0,
        "OCRBench.Scene_Text-centric_VQA": 171.0,
        "OCRBench.Final_Score": 801.0,
        "Video-MME_64frame_subs.short.overall": 0.65,
        "Video-MME_64frame_subs.short.domain.Sports": 0.5,
        "Video-MME_64frame_subs.overall.overall": 0.61,
    }
    assert read_results(folder) == expected
    assert read_results(tmp_path, "vlmevalkit") == expected
    only = read_results(folder / "MyVL_OCRBench_score.json")
    assert only == {name: v for name, v in expected.items() if name.startswith("OCRBench")}


def test_lmms_eval(tmp_path: Path) -> None:
    value = {
        "results": {
            "mme": {
                "alias": "mme",
                "mme_cognition_score,none": 303.5,
                "mme_cognition_score_stderr,none": "N/A",
            },
            "gsm8k": {
                "alias": " - gsm8k",
                "exact_match,strict-match": 0.81,
                "exact_match_stderr,strict-match": 0.01,
                "exact_match,flexible-extract": 0.84,
            },
            "textvqa_val": {"submission,none": None, "exact_match,none": 0.7},
        },
        "configs": {"mme": {"num_fewshot": 0}},
        "n-shot": {"mme": 0},
    }
    path = write(tmp_path / "model" / "20251103_120000_results.json", value)
    expected = {
        "mme.mme_cognition_score": 303.5,
        "gsm8k.exact_match@strict-match": 0.81,
        "gsm8k.exact_match@flexible-extract": 0.84,
        "textvqa_val.exact_match": 0.7,
    }
    assert read_results(path) == read_results(tmp_path) == expected


def test_nemo_skills(tmp_path: Path) -> None:
    value = {
        "livecodebench": {
            "pass@1[avg-of-4]": {"num_entries": 454, "avg_tokens": 5081, "accuracy": 55.4},
            "pass@4": {"num_entries": 454, "accuracy": 66.0},
        },
        "ruler.nemotron_128k": {"pass@1": {"accuracy": 72.1, "gen_seconds": 11}},
    }
    path = write(tmp_path / "eval-results" / "livecodebench" / "metrics.json", value)
    found = read_results(path)
    assert found == read_results(tmp_path)
    assert found["livecodebench.pass@1[avg-of-4].accuracy"] == 55.4
    assert found["ruler.nemotron_128k.pass@1.accuracy"] == 72.1
    assert len(found) == 7


def test_flat(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {"a.b": 1, "c.d": 0.5})
    assert read_results(path) == read_results(path, "flat") == {"a.b": 1.0, "c.d": 0.5}


@pytest.mark.parametrize(
    ("name", "text", "reader", "says"),
    [
        ("m.json", '{"a.b": "x"}', None, "a flat file holds numbers alone"),
        ("m.json", '{"a.b": true}', None, "numbers alone"),
        ("m.json", '{"a.b": NaN}', None, "no finite number"),
        ("m.json", "[1]", None, "no JSON object"),
        ("m.json", '{"a.b": ', None, "cannot be read as JSON"),
        ("m.json", '{"results": {"t": {"alias": "t"}}}', None, "no number that lmms_eval writes"),
        ("m.json", "{}", "lmms_eval", "no number that lmms_eval writes"),
        ("M_X_acc.csv", "split,Overall\n", None, "no number that vlmevalkit writes"),
        ("M_X_acc.csv", "split,Overall\nnone,nan\n", None, "no finite number"),
    ],
)
def test_a_file_without_metrics_is_refused(
    tmp_path: Path, name: str, text: str, reader: str | None, says: str
) -> None:
    with pytest.raises(ResultError, match=says) as raised:
        read_results(write(tmp_path / name, text), reader)
    assert name in str(raised.value)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "none")
    with pytest.raises(ResultError, match=r"holds no results: none of \*_acc.csv"):
        read_results(tmp_path)
    with pytest.raises(ResultError, match="no such file or folder"):
        read_results(tmp_path / "absent")


def test_metrics_that_disagree_are_refused() -> None:
    assert merge({"a": 1.0}, {"a": 1.0, "b": 2.0}, "x") == {"a": 1.0, "b": 2.0}
    with pytest.raises(ResultError, match=r"x says a is 2.0, before it was 1.0"):
        merge({"a": 1.0}, {"a": 2.0}, "x")

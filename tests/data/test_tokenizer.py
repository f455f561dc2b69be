"""Special tokens stay out of text, text comes back, training is deterministic."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from megatron_vl.data.tokenizer import (
    CONTROL_TOKENS,
    VISION_TOKENS,
    Tokenizer,
    train_tokenizer,
)

SPECIAL = st.sampled_from([*CONTROL_TOKENS, *VISION_TOKENS])


def test_published_ids(tokenizer: Tokenizer) -> None:
    first = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]
    assert [tokenizer.id_of(token) for token in first] == [0, 1, 2, 3, 4, 5]
    assert [tokenizer.id_of(f"<SPECIAL_{n}>") for n in (10, 11, 12, 31)] == [10, 11, 12, 31]
    assert [tokenizer.id_of(token) for token in VISION_TOKENS] == list(range(2038, 2048))
    assert VISION_TOKENS[:3] == ("<image>", "<img>", "</img>")
    assert tokenizer.vocab_size == 2048
    assert (tokenizer.pad_id, tokenizer.end_of_turn_id, tokenizer.image_id) == (0, 12, 2038)


@given(st.lists(st.one_of(SPECIAL, st.text(max_size=12)), max_size=8).map("".join))
def test_text_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert all(32 <= index < 2038 for index in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_decode_names_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [10, *tokenizer.encode("hé"), 2038, 12]
    assert tokenizer.decode(ids) == "<SPECIAL_10>hé<image><SPECIAL_12>"
    assert tokenizer.decode(ids, skip_special=True) == "hé"


def test_unknown_special_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="<frame>"):
        tokenizer.id_of("<frame>")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mvl data prepare stages/laptop"):
        Tokenizer.load(tmp_path / "none.json")


def test_training_is_deterministic_and_checks_its_size(tmp_path: Path) -> None:
    texts = [f"the quick brown fox {word} jumps over {word}s" for word in ("lazy", "slow")] * 3
    for name in ("one", "two"):
        train_tokenizer(texts, vocab_size=320, path=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(ValueError, match="larger than 298"):
        train_tokenizer(texts, vocab_size=298, path=tmp_path / "three")
    with pytest.raises(ValueError, match="9000 were asked"):
        train_tokenizer(texts, vocab_size=9000, path=tmp_path / "three")


def test_prefix_counts_characters(tokenizer: Tokenizer) -> None:
    text = "déjà vu: the tokenizer"
    for count in range(len(tokenizer.encode(text)) + 2):
        kept = text[: tokenizer.prefix(text, count)]
        assert text.startswith(kept)
    assert tokenizer.prefix(text, 10**6) == len(text)
    assert tokenizer.prefix(text, 0) == 0


def test_other_engines_read_the_file_alike(root: Path, tokenizer: Tokenizer) -> None:
    engine = Engine.from_file(str(root / "tokenizer" / "tokenizer.json"))
    text = "def f(x):\n    return 12 + x"
    assert engine.encode(text).ids == tokenizer.encode(text)
    assert engine.encode("<image>").ids == [2038]

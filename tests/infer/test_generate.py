"""Greedy answers of a small drawn model: the same every time, as long as there is room, and
looking at the picture."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vl.data.encode import encode_prompt, load_tokenizer
from megatron_vl.data.pack import Pack
from megatron_vl.infer.generate import Question, answer, asked, held_out
from megatron_vl.infer.model import OpenModel, open_model
from tests.support.packs import pack_of_documents, run_pack, text_document

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(small_run: Path) -> Iterator[OpenModel]:
    with open_model(small_run) as opened:
        yield opened


def logits(model: OpenModel, question: Question) -> torch.Tensor:
    encoded = encode_prompt(model.config, question.messages, question.images, False)
    return model.last_logits(encoded, [])


def other_picture(data: bytes) -> bytes:
    """The same picture with its colours turned round, as PNG."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    buffer = io.BytesIO()
    picture.point(lambda value: 255 - value).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_answer_is_the_same_every_time(model: OpenModel) -> None:
    question = asked("What is on the table?", None)
    said: list[str] = []
    first = answer(model, question, reasoning=False, max_new_tokens=6, say=said.append)
    assert first == answer(model, question, reasoning=False, max_new_tokens=6)
    assert first
    assert len(said) == 6
    assert said[-1] == first
    assert first != answer(
        model, asked("Name three rivers.", None), reasoning=False, max_new_tokens=6
    )


def test_each_token_is_the_likeliest_after_those_before(model: OpenModel) -> None:
    """Against one forward pass over prompt and answer, read position by position."""
    question = asked("Count to five.", None)
    prompt = encode_prompt(model.config, question.messages, [], False)
    chosen: list[int] = []
    for _ in range(4):
        tokens = [*prompt.tokens_L.tolist(), *chosen]
        with torch.no_grad():
            whole = run_pack(
                model.module, pack_of_documents(model.config, [text_document(tokens)], [])
            )
        chosen.append(int(whole[-1, : model.config.model.vocab_size].argmax()))
    tokenizer = load_tokenizer(model.config)
    assert tokenizer.end_of_turn_id not in chosen
    expected = tokenizer.decode(chosen, skip_special=True)
    assert answer(model, question, reasoning=False, max_new_tokens=4) == expected


def test_an_answer_ends_where_the_sequence_does(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last forward pass sees one token less than the stage's sequence length."""
    question = asked("Tell me everything.", None)
    prompt_length = encode_prompt(model.config, question.messages, [], False).num_tokens
    lengths: list[int] = []

    def never_ends(prompt: Pack, new_tokens: list[int]) -> torch.Tensor:
        lengths.append(prompt.num_tokens + len(new_tokens))
        return torch.nn.functional.one_hot(torch.tensor(65), model.config.model.vocab_size)

    short = OpenModel(model.module, model.config)
    object.__setattr__(short, "last_logits", never_ends)
    answer(short, question, reasoning=False, max_new_tokens=10_000)
    assert lengths == list(range(prompt_length, model.config.data.sequence_length))


def test_an_answer_ends_at_the_end_of_the_turn(model: OpenModel) -> None:
    end = load_tokenizer(model.config).end_of_turn_id
    script = [65, 66, end, 67]
    scripted = OpenModel(model.module, model.config)
    step = iter(script)
    object.__setattr__(
        scripted,
        "last_logits",
        lambda *_: torch.nn.functional.one_hot(
            torch.tensor(next(step)), model.config.model.vocab_size
        ),
    )
    said: list[str] = []
    answer(scripted, asked("Go.", None), reasoning=False, max_new_tokens=9, say=said.append)
    assert len(said) == 2
    assert next(step) == 67


def test_a_prompt_without_room_is_refused_with_its_length(model: OpenModel) -> None:
    with pytest.raises(ValueError, match=r"sequence_length is 160; shorten it by \d+ tokens"):
        answer(model, asked("word " * 400, None), reasoning=False, max_new_tokens=1)


def test_a_held_out_question_with_its_picture_is_answered(model: OpenModel) -> None:
    (question,) = held_out(model, "captions", 1)
    assert len(question.images) == 1
    assert question.reference
    assert question.messages[-1]["role"] == "user"
    prompt = encode_prompt(model.config, question.messages, question.images, False)
    assert len(prompt.grids) >= 1
    assert int((prompt.visual_rows_L >= 0).sum()) == 16 * len(prompt.grids)
    assert answer(model, question, reasoning=False, max_new_tokens=2)
    assert len({one.prompt for one in held_out(model, "qa", 3)}) > 1


def test_another_picture_gives_other_logits(model: OpenModel) -> None:
    (question,) = held_out(model, "captions", 1)
    before = logits(model, question)
    assert torch.equal(before, logits(model, question))
    assert before.shape == (model.config.model.vocab_size,)
    changed = replace(question, images=[other_picture(question.images[0])])
    after = logits(model, changed)
    assert float((after - before).norm() / before.norm()) > 1e-3


def test_reasoning_asks_in_another_way(model: OpenModel) -> None:
    question = asked("Why?", None)
    plain = encode_prompt(model.config, question.messages, [], False).tokens_L.tolist()
    thinking = encode_prompt(model.config, question.messages, [], True).tokens_L.tolist()
    assert plain != thinking

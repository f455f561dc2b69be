"""Greedy answers of a small drawn model: the same every time, as long as there is room, and
looking at the picture."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vl.data.encode import encode_prompt, load_tokenizer
from megatron_vl.data.pack import Pack
from megatron_vl.infer.decode import Options, respond
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
    question = asked("What is on the table?")
    said: list[str] = []
    first = answer(model, question, reasoning=False, max_new_tokens=6, say=said.append)
    assert first == answer(model, question, reasoning=False, max_new_tokens=6)
    assert first
    assert len(said) == 6
    assert said[-1] == first
    assert first != answer(model, asked("Name three rivers."), reasoning=False, max_new_tokens=6)


def test_each_token_is_the_likeliest_after_those_before(model: OpenModel) -> None:
    """Against one forward pass over prompt and answer, read position by position."""
    question = asked("Count to five.")
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


def scripted(model: OpenModel, script: Iterable[int]) -> tuple[OpenModel, list[int]]:
    """The model with a cache that asks for the script's tokens; and the tokens it was told."""
    told: list[int] = []
    steps = iter(script)

    class Cache:
        def prefill(self, prompt: Pack) -> torch.Tensor:
            return self.logits()

        def push(self, token: int) -> torch.Tensor:
            told.append(token)
            return self.logits()

        def logits(self) -> torch.Tensor:
            token = torch.tensor(next(steps))
            return torch.nn.functional.one_hot(token, model.config.model.vocab_size)

    actor = OpenModel(model.module, model.config)
    object.__setattr__(actor, "decoding", lambda room: Cache())
    return actor, told


def test_an_answer_ends_where_the_sequence_does(model: OpenModel) -> None:
    """The last token fills the stage's sequence length and is not read any more."""
    question = asked("Tell me everything.")
    prompt_length = encode_prompt(model.config, question.messages, [], False).num_tokens
    actor, told = scripted(model, repeat(65))
    said = respond(actor, question, Options(max_new_tokens=10_000))
    assert said.finish == "length"
    assert prompt_length + len(said.tokens) == model.config.data.sequence_length
    assert told == said.tokens[:-1]


def test_an_answer_ends_at_the_end_of_the_turn(model: OpenModel) -> None:
    end = load_tokenizer(model.config).end_of_turn_id
    actor, told = scripted(model, [65, 66, end, 67])
    spoken: list[str] = []
    said = respond(actor, asked("Go."), Options(max_new_tokens=9), spoken.append)
    assert (said.finish, said.tokens, told) == ("end_of_turn", [65, 66], [65, 66])
    assert spoken[-1] == said.text


def words(model: OpenModel, *texts: str) -> list[int]:
    return [token for text in texts for token in load_tokenizer(model.config).encode(text)]


def thinking(budget: int | None, grace: int = 500) -> Options:
    return Options(max_new_tokens=90, reasoning=True, reasoning_budget=budget, grace=grace)


def test_a_spent_budget_ends_the_trace_at_the_line_end(model: OpenModel) -> None:
    """What closes it is told to the model; then the model goes on."""
    end = load_tokenizer(model.config).end_of_turn_id
    line, more = words(model, "a b c\n"), words(model, "d e\n")
    closing, reply = words(model, "</think>\n\n"), words(model, "Yes.")
    # What the model would say while the closing is told is not looked at.
    actor, told = scripted(model, [*line, *more, *[66] * len(closing), *reply, end])
    said = respond(actor, asked("Is it?"), thinking(len(line)))
    assert told[: len(line + more + closing)] == line + more + closing
    assert said.budget_spent
    assert (said.trace, said.reply) == ("a b c\nd e", "Yes.")
    assert said.tokens[: len(line + more + closing)] == line + more + closing


def test_a_trace_that_ends_itself_is_left_alone(model: OpenModel) -> None:
    end = load_tokenizer(model.config).end_of_turn_id
    script = words(model, "a\n</think>\n\nYes\nno\nmaybe\n")
    actor, told = scripted(model, [*script, end])
    said = respond(actor, asked("Is it?"), thinking(len(words(model, "a\n</think>"))))
    assert (said.budget_spent, told) == (False, script)
    assert (said.trace, said.reply) == ("a", "Yes\nno\nmaybe")


def test_a_trace_without_line_ends_is_broken_off(model: OpenModel) -> None:
    actor, told = scripted(model, repeat(words(model, "a")[0]))
    said = respond(actor, asked("Is it?"), thinking(10, grace=4))
    closing = words(model, ".\n</think>\n\n")
    assert said.budget_spent
    assert told[14 : 14 + len(closing)] == closing
    assert "</think>" not in said.reply


def test_without_a_budget_a_trace_goes_on(model: OpenModel) -> None:
    actor, _ = scripted(model, repeat(words(model, "\n")[0]))
    said = respond(actor, asked("Is it?"), replace(thinking(None), max_new_tokens=30))
    assert (said.budget_spent, said.reply, len(said.tokens)) == (False, "", 30)
    # With reasoning off there is no trace to bound.
    plain = respond(actor, asked("Is it?"), Options(max_new_tokens=30, reasoning_budget=2))
    assert (plain.budget_spent, plain.trace) == (False, "")


def test_a_prompt_without_room_is_refused_with_its_length(model: OpenModel) -> None:
    with pytest.raises(ValueError, match=r"sequence_length is 160; shorten it by \d+ tokens"):
        answer(model, asked("word " * 400), reasoning=False, max_new_tokens=1)


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
    question = asked("Why?")
    plain = encode_prompt(model.config, question.messages, [], False).tokens_L.tolist()
    thinking = encode_prompt(model.config, question.messages, [], True).tokens_L.tolist()
    assert plain != thinking

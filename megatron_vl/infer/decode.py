"""An answer, token by token: prefill, choose, push, until the turn ends.

With reasoning on the prompt leaves a trace open; `Thinking` closes it when its budget is spent, and
what closes it is read by the model like its own words. Forced tokens count as tokens of the answer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_vl.data.chat import reasoning_mode, split_trace
from megatron_vl.data.encode import encode_prompt
from megatron_vl.data.pack import Pack
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.data.tools import calls_in
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.question import Question
from megatron_vl.infer.sampling import Sampler, Sampling
from megatron_vl.infer.thinking import END, GRACE, Thinking

END_OF_TURN, LENGTH = "end_of_turn", "length"


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    Attributes:
        max_new_tokens: longest answer, its trace counted. [tokens]
        reasoning: whether it starts with a trace, unless a message says /think or /no_think.
        reasoning_budget: tokens of the trace; None is without bound.
        grace: tokens past the budget after which a trace is broken off.

    Raises:
        ValueError: an answer of no tokens.
    """

    max_new_tokens: int = 128
    reasoning: bool = False
    reasoning_budget: int | None = None
    grace: int = GRACE
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; the least is 1")


@dataclass(frozen=True)
class Answer:
    """What was said.

    Attributes:
        text: all of it, the trace included, without special tokens.
        trace, reply: its two parts; a trace without an end has no reply.
        tokens: ids, the end of the turn not included.
        finish: end_of_turn, or length where the room or max_new_tokens ended it.
        budget_spent: the trace was closed for the model.
        prompt_tokens: of the question.
        prefill_seconds, decode_seconds: until the first token's logits, and for the rest.
    """

    text: str
    trace: str
    reply: str
    tokens: list[int]
    finish: str
    budget_spent: bool
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """Functions the reply calls: name and arguments each."""
        return calls_in(self.reply)


class _Trace:
    """The open trace of an answer, and whether it must end."""

    def __init__(self, open_: bool, thinking: Thinking, tokenizer: Tokenizer) -> None:
        self.open = open_
        self.spent = False
        self._thinking, self._tokenizer = thinking, tokenizer

    def forced(self, new: list[int]) -> list[int]:
        """Tokens that end the trace now, after the tokens `new`; none while it may go on."""
        if not self.open:
            return []
        if END in self._tokenizer.decode(new[-2 * len(END) :], skip_special=True):
            self.open = False
            return []
        piece = self._tokenizer.decode(new[-1:], skip_special=True)
        closing = self._thinking.closing(len(new), piece)
        if not closing:
            return []
        self.open, self.spent = False, True
        return self._tokenizer.encode(closing)


def prompt_of(model: OpenModel, question: Question, reasoning: bool) -> Pack:
    """The question as the model reads it.

    Raises:
        ValueError: it leaves no room for an answer.
    """
    prompt = encode_prompt(
        model.config,
        question.messages,
        question.images,
        reasoning,
        evs_rate=question.evs_rate,
        tools=question.tools,
        tokenizer=model.tokenizer,
    )
    over = prompt.num_tokens + 1 - model.config.data.sequence_length
    if over > 0:
        raise ValueError(
            f"the prompt has {prompt.num_tokens} tokens, the stage's sequence_length is "
            f"{model.config.data.sequence_length}; shorten it by {over} tokens"
        )
    return prompt


def _parts(text: str, thought: bool) -> tuple[str, str]:
    """Trace and reply of an answer; a trace without an end has no reply."""
    if not thought:
        return "", text
    return split_trace(text) if END in text else (text, "")


def respond(
    model: OpenModel,
    question: Question,
    options: Options,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Answer one question.

    Args:
        say: called with the whole answer so far after each token.

    Raises:
        ValueError: the prompt leaves no room for an answer, or a medium cannot be read.
    """
    tokenizer = model.tokenizer
    prompt = prompt_of(model, question, options.reasoning)
    room = model.config.data.sequence_length - prompt.num_tokens
    limit = min(room, options.max_new_tokens)
    thinking = Thinking(options.reasoning_budget, options.grace)
    trace = _Trace(reasoning_mode(question.messages, options.reasoning), thinking, tokenizer)
    thought = trace.open
    sampler = Sampler(options.sampling)
    started = time.perf_counter()
    decoding = model.decoding(prompt.num_tokens + limit)
    logits_V = decoding.prefill(prompt)
    first = time.perf_counter()
    new: list[int] = []
    forced: list[int] = []
    finish = LENGTH
    while len(new) < limit:
        token = forced.pop(0) if forced else sampler.choose(model.known(logits_V))
        if token == tokenizer.end_of_turn_id:
            finish = END_OF_TURN
            break
        new.append(token)
        if say is not None:
            say(tokenizer.decode(new, skip_special=True))
        forced = forced or trace.forced(new)
        if len(new) < limit:
            logits_V = decoding.push(token)
    text = tokenizer.decode(new, skip_special=True)
    said_trace, reply = _parts(text, thought)
    return Answer(
        text=text,
        trace=said_trace,
        reply=reply,
        tokens=new,
        finish=finish,
        budget_spent=trace.spent,
        prompt_tokens=prompt.num_tokens,
        prefill_seconds=first - started,
        decode_seconds=time.perf_counter() - first,
    )

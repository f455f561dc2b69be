"""Text-only conversations of the laptop recipe: code, documentation, small problems, long
documents.

Each builder draws one conversation (a list of messages in v2 form) from a random generator and a
split. Reasoning traces are computed, step by step, by the code that computes the answer.
"""

from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

from megatron_vl.data.documents import (
    Function,
    functions,
    modules,
    paragraphs,
    split_of,
    topics,
    words,
)

Messages = list[dict[str, Any]]

SHORT_CODE = (60, 700)
"""Characters a function may have to become a code sample."""

EMPTY_BODIES = ("pass", "...", "raise NotImplementedError")
"""Ends of functions that do nothing worth learning."""

LONG_DOCUMENT = (2400, 10000)
"""Characters a document may have to become a long_text sample."""


def _turn(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def _ask(question: str, answer: str) -> Messages:
    return [_turn("user", question), _turn("assistant", answer)]


def _with_trace(trace: str, answer: str) -> str:
    return f"<think>\n{trace}\n</think>\n\n{answer}"


@lru_cache(maxsize=2)
def _short_functions(split: str) -> tuple[Function, ...]:
    low, high = SHORT_CODE
    return tuple(
        found
        for found in functions(split)
        if low <= len(found.source) <= high and not found.body.endswith(EMPTY_BODIES)
    )


def code(random: Random, split: str) -> Messages:
    """A task on a function of the standard library."""
    function = random.choice(_short_functions(split))
    kind = random.random()
    if kind < 0.45:
        question = f"Write this Python function.\n\n{function.signature}\n# {function.summary}"
        return _ask(question, function.body)
    if kind < 0.75:
        lines = function.body.splitlines()
        shown = "\n".join(lines[: max(1, len(lines) * random.randint(30, 70) // 100)])
        return _ask(f"Complete the function.\n\n{shown}", function.body)
    if kind < 0.9:
        return _ask(f"What does this function do?\n\n{function.body}", function.summary)
    name = function.name.split(".")[-1]
    hidden = function.body.replace(name, "f")
    return _ask(f"What would be a good name for f?\n\n{hidden}", name)


def _definition(random: Random, split: str) -> Messages:
    function = random.choice(functions(split))
    return _ask(f"What does {function.module}.{function.name} do?", function.summary)


def _two_definitions(random: Random, split: str) -> Messages:
    return [*_definition(random, split), *_definition(random, split)]


def _continuation(random: Random, split: str) -> Messages:
    text = random.choice(paragraphs(split)).split()
    cut = len(text) * random.randint(30, 60) // 100
    return _ask("Continue the text.\n\n" + " ".join(text[:cut]), " ".join(text[cut:]))


def _first_words(random: Random, split: str) -> Messages:
    text = random.choice(paragraphs(split)).split()[:30]
    count = random.randint(2, 5)
    question = f"Repeat the first {count} words of this text.\n\n{' '.join(text)}"
    return _ask(question, " ".join(text[:count]))


def _sum(random: Random, split: str) -> Messages:
    a, b = random.randint(10, 99), random.randint(10, 99)
    units, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    steps = f"{a % 10} + {b % 10} = {units}\n{tens - b // 10 * 10} + {b // 10 * 10} = {tens}"
    trace = f"{steps}\n{tens} + {units} = {a + b}"
    return _ask(f"What is {a} + {b}?", _with_trace(trace, str(a + b)))


def _plain_sum(random: Random, split: str) -> Messages:
    a, b = random.randint(0, 20), random.randint(0, 20)
    return _ask(f"What is {a} + {b}?", str(a + b))


def _letters(random: Random, split: str) -> Messages:
    word = random.choice(words(split))
    letter = random.choice(word)
    marks = [f"{index}: {here}" for index, here in enumerate(word, start=1) if here == letter]
    spelled = f"{word} is spelled {' '.join(word)}. The letter {letter} stands at"
    trace = "\n".join([spelled, *marks])
    question = f"How often does the letter {letter} occur in {word}?"
    return _ask(question, _with_trace(trace, str(len(marks))))


def _sorting(random: Random, split: str) -> Messages:
    chosen = [word.lower() for word in random.sample(words(split), random.randint(3, 4))]
    ordered = sorted(chosen)
    rest, steps = list(chosen), []
    for word in ordered[:-1]:
        steps.append(f"First of {', '.join(rest)}: {word}")
        rest.remove(word)
    question = f"Sort these words by the alphabet: {', '.join(chosen)}"
    return _ask(question, _with_trace("\n".join(steps), ", ".join(ordered)))


_TEXT_KINDS: tuple[tuple[Callable[[Random, str], Messages], int], ...] = (
    (_definition, 28),
    (_two_definitions, 5),
    (_continuation, 27),
    (_first_words, 8),
    (_sum, 10),
    (_plain_sum, 7),
    (_letters, 8),
    (_sorting, 7),
)


def text(random: Random, split: str) -> Messages:
    """A text conversation: documentation, an instruction or a small problem."""
    kinds, weights = zip(*_TEXT_KINDS, strict=True)
    return random.choices(kinds, weights)[0](random, split)


@lru_cache(maxsize=2)
def _long_documents(split: str) -> tuple[str, ...]:
    low, high = LONG_DOCUMENT
    found = [body for _, body in topics(split)]
    found += [source for name, source in modules() if split_of(name) == split]
    return tuple(body for body in found if low <= len(body) <= high)


def _planted_fact(random: Random, split: str, document: str) -> tuple[str, str, str]:
    """A document with a number set into its first 700 characters; question and answer."""
    name, number = random.choice(words(split)).lower(), random.randint(100, 999)
    place = document.find("\n", random.randint(0, 600))
    fact = f"\nThe number of {name} is {number}.\n"
    return document[:place] + fact + document[place:], f"What is the number of {name}?", str(number)


def _next_words(random: Random, document: str) -> tuple[str, str]:
    """A question about eight words of the document's first 800 characters, and the answer."""
    opening = document[:800].split()[:-1]
    start = random.randrange(max(1, len(opening) - 12))
    question = f"How does the text go on after: {' '.join(opening[start : start + 4])}"
    return question, " ".join(opening[start + 4 : start + 12])


def long_text(random: Random, split: str) -> Messages:
    """A whole document, then three to five questions about its first part.

    The document is a part of its own, so that a sequence too short for it loses the document's end
    and never a question; what is asked for stands in the first thousand characters.
    """
    document, question, answer = _planted_fact(random, split, random.choice(_long_documents(split)))
    pairs = [(question, answer)]
    pairs += [_next_words(random, document) for _ in range(random.randint(2, 4))]
    random.shuffle(pairs)
    messages = [_turn("user", document, f"\n\n{pairs[0][0]}"), _turn("assistant", pairs[0][1])]
    for question, answer in pairs[1:]:
        messages += _ask(question, answer)
    return messages

"""Conversations in no format, and ways to break them.

A `Spec` is what a row of any public set says: roles, and pieces that are texts or names of media.
Replicas are written from specs, and what a conversion must give back is read off them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tests.data.convert.pictures import album, clip, encoded, picture

WORDS = [
    *("what", "where", "colour", "of", "the", "small", "tower", "bird", "über", "straße", "東京"),
    *("3.14", "x²", "{brace}", "[list]", 'quote"', "back\\slash", "<b>bold</b>", "<SPECIAL_12>"),
    *("<img>", "</img>", "[INST]", "<unk>", "/think?", "</think>"),
]


@dataclass(frozen=True)
class Show:
    """A medium in a conversation, by name."""

    name: str

    @property
    def kind(self) -> str:
        return "video" if self.name.endswith((".mp4", ".mkv")) else "image"


@dataclass
class Spec:
    """A conversation in no format: roles and pieces, each a text or a medium.

    bare: its one image stands first and has no placeholder. rowless: it has no field for media.
    """

    id: str
    turns: list[tuple[str, list[Any]]]
    bare: bool = False
    rowless: bool = False

    @property
    def shown(self) -> list[Show]:
        return [piece for _, pieces in self.turns for piece in pieces if isinstance(piece, Show)]


def sentence(dice: random.Random) -> str:
    """Some words, some of them awkward; never blank."""
    return " ".join(dice.choice(WORDS) for _ in range(dice.randint(3, 9)))


def specs(dice: random.Random, kinds: list[str], count: int, names: list[str]) -> list[Spec]:
    """Conversations of these kinds in turn."""
    made = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        image = Show(dice.choice(names))
        ask, answer = sentence(dice), sentence(dice)
        turns: list[tuple[str, list[Any]]] = [
            ("user", [image, f"\n{ask}"]),
            ("assistant", [answer]),
        ]
        spec = Spec(f"row-{index}", turns)
        if kind == "text":
            spec.turns[0] = ("user", [f"{ask} with <image> and <video> as words"])
            spec.rowless = True
        elif kind == "middle":
            spec.turns[0] = ("user", [f"{ask} ", image, f" {sentence(dice)}"])
        elif kind == "bare":
            spec.turns[0] = ("user", [image, ask])
            spec.bare = True
        elif kind == "two":
            spec.turns[0] = ("user", [image, "and", Show(dice.choice(names)), ask])
        elif kind == "many turns":
            spec.turns += [("user", [sentence(dice)]), ("assistant", [f"{answer} <image>"])]
        elif kind == "system":
            spec.turns.insert(0, ("system", [sentence(dice)]))
        elif kind == "video":
            spec.turns[0] = ("user", [Show(dice.choice(["v/a.mp4", "v/b.mp4"])), ask])
        made.append(spec)
    return made


@lru_cache(maxsize=1)
def media_files() -> dict[str, bytes]:
    """Everything the specs show, and what the faults need."""
    whole = encoded(picture(99, 120, 90), "JPEG")
    png = encoded(picture(98, 120, 90), "PNG")
    return {
        **album(),
        "v/a.mp4": clip(1),
        "v/b.mp4": clip(2, frames=14),
        "bad/empty.jpg": b"",
        "bad/head.jpg": whole[:90],
        "bad/half.jpg": whole[: len(whole) // 2],
        "bad/half.png": png[: len(png) // 2],
        "bad/text.jpg": b"this is no image\n" * 40,
        "bad/cut.mp4": clip(3)[:-400],
    }


def place(spec: Spec, piece: Any) -> None:
    """Show another medium in the first place that shows one."""
    for _, pieces in spec.turns:
        for at, old in enumerate(pieces):
            if isinstance(old, Show):
                pieces[at] = piece
                return
    raise AssertionError("the row shows nothing")


def showing(name: str) -> Callable[[Spec], None]:
    """A break: the row shows this file."""
    return lambda spec: place(spec, Show(name))


def says(role: str, pieces: list[Any]) -> Callable[[Spec], None]:
    """A break: the first turn of a role has these pieces."""

    def change(spec: Spec) -> None:
        at = next(at for at, (found, _) in enumerate(spec.turns) if found == role)
        spec.turns[at] = (role, pieces)

    return change


def renamed_role(spec: Spec) -> None:
    spec.turns[-1] = ("narrator", spec.turns[-1][1])


def no_answer(spec: Spec) -> None:
    spec.turns = [turn for turn in spec.turns if turn[0] != "assistant"]


def late_system(spec: Spec) -> None:
    spec.turns.append(("system", ["too late"]))


def one_more_tag(spec: Spec) -> None:
    spec.turns[-2][1].append(" <image>")


MEDIA_BREAKS: list[tuple[str, Callable[[Spec], None]]] = [
    ("unreadable medium", showing("bad/empty.jpg")),
    ("unreadable medium", showing("bad/head.jpg")),
    ("unreadable medium", showing("bad/half.jpg")),
    ("unreadable medium", showing("bad/half.png")),
    ("unreadable medium", showing("bad/text.jpg")),
    ("missing medium", showing("bad/nowhere.jpg")),
]
NAME_BREAKS: list[tuple[str, Callable[[Spec], None]]] = [
    ("remote medium", showing("https://example.org/a.jpg")),
    ("medium outside its root", showing("../../outside.jpg")),
]
TURN_BREAKS: list[tuple[str, Callable[[Spec], None]]] = [
    ("unknown role", renamed_role),
    ("no assistant turn", no_answer),
    ("empty content", says("assistant", [" \n"])),
    ("misplaced turn or medium", late_system),
    ("text that is no unicode", says("assistant", ["half \ud83d a pair"])),
]

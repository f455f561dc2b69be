"""Text to token ids and back, with special tokens that text can never produce.

One class serves the laptop's own byte-level BPE, trained by `train_tokenizer`, and the
`tokenizer.json` of a released checkpoint. The special ids follow the Nemotron Nano v2 tokenizer:
control tokens first, then bytes and merges, then the ten vision tokens in the published order
(131072 ... 131081 in the 12B, the last ten ids of the vocabulary on the laptop).

A user who types `<image>` or `<SPECIAL_12>` gets the bytes of those characters: special ids enter a
sequence only where the chat code asks for them by name.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

NUM_CONTROL_TOKENS = 32
"""Ids kept for control tokens in front of the bytes of a tokenizer trained here."""

CONTROL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    *(f"<SPECIAL_{index}>" for index in range(10, NUM_CONTROL_TOKENS)),
)

VISION_TOKENS = (
    "<image>",
    "<img>",
    "</img>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<video>",
)

PAD = "<unk>"
SYSTEM = "<SPECIAL_10>"
SPEAKER = "<SPECIAL_11>"
END_OF_TURN = "<SPECIAL_12>"
IMAGE = "<image>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"

_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the one character before it
    r"|\p{N}"  # each digit alone, so that numbers are read by place
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with its line end
    r"|\s*[\r\n]+"  # line ends with the indentation before them
    r"|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE and write it as a tokenizer.json; the same texts give the same file.

    Args:
        texts: training text, in a fixed order.
        vocab_size: ids in all: control tokens, bytes, merges and vision tokens. [tokens]
        path: file to write; its folder exists.

    Raises:
        ValueError: vocab_size leaves no room for merges, or the text gives too few of them.
    """
    fixed = NUM_CONTROL_TOKENS + 256 + len(VISION_TOKENS)
    if vocab_size <= fixed:
        raise ValueError(f"vocab_size is {vocab_size}; it must be larger than {fixed}")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(VISION_TOKENS),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.add_special_tokens(list(VISION_TOKENS))
    if engine.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives a vocabulary of {engine.get_vocab_size()}, {vocab_size} were asked "
            "for: train on more text or lower model.vocab_size"
        )
    engine.save(str(path), pretty=False)


class Tokenizer:
    """A tokenizer.json, read so that plain text and special tokens stay apart."""

    def __init__(self, text_of_file: str):
        definition = json.loads(text_of_file)
        added = definition.get("added_tokens") or []
        self._id_of: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._token_of = {index: token for token, index in self._id_of.items()}
        # Without these four the engine sees bytes and merges only, and never cuts or pads.
        plain: dict[str, Any] = {
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._engine = Engine.from_str(json.dumps({**definition, **plain}))
        in_merges = self._engine.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max([in_merges - 1, *self._token_of]) + 1
        """Ids of the tokenizer, added tokens included. [tokens]"""

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            FileNotFoundError: no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}; make the laptop's with `mvl data prepare stages/laptop`"
            )
        return cls(path.read_text(encoding="utf-8"))

    def id_of(self, token: str) -> int:
        """The id of a special token.

        Raises:
            ValueError: the tokenizer has no such special token.
        """
        if token not in self._id_of:
            near = ", ".join(sorted(self._id_of)[:5])
            raise ValueError(f"the tokenizer has no special token {token!r}; it has {near} ...")
        return self._id_of[token]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that text never encodes to."""
        return frozenset(self._token_of)

    @property
    def pad_id(self) -> int:
        """Fills the end of a pack."""
        return self.id_of(PAD)

    @property
    def end_of_turn_id(self) -> int:
        """Ends a turn; generation stops at it."""
        return self.id_of(END_OF_TURN)

    @property
    def image_id(self) -> int:
        """Stands where a visual embedding goes."""
        return self.id_of(IMAGE)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; names of special tokens in it are ordinary characters."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        return [
            list(encoding.ids)
            for encoding in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def prefix(self, text: str, num_tokens: int) -> int:
        """Characters at the start of a text that its first num_tokens tokens cover."""
        offsets = self._engine.encode(text, add_special_tokens=False).offsets
        return 0 if num_tokens < 1 or not offsets else offsets[min(num_tokens, len(offsets)) - 1][1]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; special tokens appear by name unless skipped.

        Bytes that do not form UTF-8 become the replacement character, and ids the tokenizer does
        not have (padding rows of an embedding matrix) are left out.
        """
        pieces: list[str] = []
        run: list[int] = []
        for index in ids:
            token = self._token_of.get(index)
            if token is None:
                run.append(index)
                continue
            pieces.append(self._engine.decode(run, skip_special_tokens=False))
            run = []
            if not skip_special:
                pieces.append(token)
        pieces.append(self._engine.decode(run, skip_special_tokens=False))
        return "".join(pieces)

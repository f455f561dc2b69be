"""The page of samples: every token, what is trained on, grids of tiles, and broken samples too."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import chat
from megatron_vl.data.convert.run import Request, convert
from megatron_vl.data.fit import fit_sample, headers_of
from megatron_vl.data.inspect import cards_of, render, spread, words_of
from megatron_vl.data.store import SourceStore
from megatron_vl.data.view import View, open_view
from megatron_vl.sequence.grids import tile_grid
from megatron_vl.sequence.layout import UNSUPERVISED
from tests.data.conftest import with_data
from tests.data.convert.replicas import build


class Page(HTMLParser):
    """What stands on a page: tokens with their classes, images, lines of grids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.boxes: list[str] = []
        self._style: str | None = None
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "svg":
            self.boxes.append(given["viewbox"] or "")
        if tag == "b" and given.get("title"):
            self._style = given["class"] or ""
            self.tokens.append((self._style, ""))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "line":
            assert self.open.pop() == tag
        if tag == "b":
            self._style = None

    def handle_data(self, data: str) -> None:
        if self._style is not None:
            self.tokens[-1] = (self._style, self.tokens[-1][1] + data)


@pytest.fixture(scope="module")
def view(stage: StageConfig, root: Path) -> View:
    return open_view(root / "qa", stage, None)


def test_every_token_is_on_the_page(root: Path, view: View) -> None:
    store = SourceStore(root, "qa", "train")
    for key in spread(store.keys, 6):
        page = Page(render(list(cards_of(store, [key], view)), "a page"))
        sample = store.sample(key)
        headers = headers_of(sample)
        fitted = fit_sample(sample, headers, view.tokenizer, view.room)
        visuals = view.room.visuals(headers, fitted.limits, 0.0)
        document = chat.encode_conversation(sample.messages, view.tokenizer, visuals)
        shown = "".join(text for _, text in page.tokens)
        whole = view.tokenizer.decode(document.tokens_N.tolist())
        assert shown == re.sub(r"(<image>)+", "<image>", whole)
        trained = "".join(text for style, text in page.tokens if "turn-0" in style)
        picked = document.tokens_N[document.turn_ids_N != UNSUPERVISED].tolist()
        assert trained == view.tokenizer.decode(picked)
        assert trained.endswith("<SPECIAL_12>")
    store.close()


def test_grids_are_drawn_and_nothing_is_fetched(root: Path, view: View) -> None:
    store = SourceStore(root, "captions", "train")
    cards = list(cards_of(store, store.keys[:8], view))
    page = Page(render(cards, "a page"))
    grids = []
    for key in store.keys[:8]:
        ((width, height),) = headers_of(store.sample(key))
        grid = tile_grid(width, height, tile_size=64, max_tiles=12)
        grids.append(f"0 0 {grid.cols} {grid.rows}")
    assert page.boxes == grids
    assert len(set(grids)) > 1
    assert len(page.links) == 8
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    store.close()


def test_text_cannot_break_the_page(view: View) -> None:
    messages = [
        {"role": "user", "content": "</b><script>alert(1)</script> <img> & <SPECIAL_12>"},
        {"role": "assistant", "content": 'ünï 東京 "quoted"'},
    ]
    document = chat.encode_conversation(messages, view.tokenizer)
    words = list(words_of(document, view.tokenizer))
    assert sum(word.count for word in words) == len(document)
    specials = [word.text for word in words if "special" in word.style]
    assert specials == ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_11>", "<SPECIAL_12>"]


def test_what_gave_way_is_said(root: Path, stage: StageConfig) -> None:
    tight = open_view(root / "captions", with_data(stage, sequence_length=96), None)
    store = SourceStore(root, "captions", "train")
    facts = [dict(card.facts) for card in cards_of(store, store.keys, tight)]
    assert any("fewer tiles" in fact for fact in facts)
    store.close()


def test_videos_and_broken_samples(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = build("nemotron-v2", tmp_path, rows=240)
    convert(Request("nemotron-v2", replica.source, tmp_path / "v2", held_out=0.0, strict=False))
    store = SourceStore(tmp_path, "v2", "train")
    clips = [
        key
        for key in store.keys
        if any(part["type"] == "video" for part in chat.visual_parts(store.sample(key).messages))
    ][:2]
    cards = list(cards_of(store, clips, view))
    page = render(cards, "clips")
    assert "Frame 1 sampled at 0.00 seconds" in page
    assert len(Page(page).links) == sum(len(card.pictures[0].frames) for card in cards) > 4

    def broken(name: str) -> bytes:
        raise ValueError("the tar <is> gone")

    monkeypatch.setattr(store, "_read", broken)
    (card,) = cards_of(store, clips[:1], view)
    assert "the tar &lt;is&gt; gone" in render([card], "broken")
    with pytest.raises(ValueError, match="no sample 'nowhere'"):
        list(cards_of(store, ["nowhere"], view))
    store.close()


def test_spread() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(2), 5) == [0, 1]

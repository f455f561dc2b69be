"""Tables on the terminal and in logs.

No cell is ever cut: on a narrow terminal the text columns wrap between words, and what is wider
still goes on in the terminal's next line; off a terminal a table is as wide as it needs to be.
"""

import io
from collections.abc import Sequence
from typing import Literal

_WIDE = 200
STATUS_STYLES = {
    "done": "green",
    "running": "cyan",
    "partial": "cyan",
    "failed": "red",
    "lost": "red",
    "held": "yellow",
    "holds": "yellow",
    "incomplete": "yellow",
}


def print_table(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int,
    styles: dict[str, str] | None = None,
) -> None:
    """Print a table whose first `left` columns are text and the others numbers.

    `styles` colours whole cells by their text.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1 if console.is_terminal and console.width < 100 else 2, 0, 0),
    )
    for index, name in enumerate(names):
        words = " ".join([name, *(row[index] for row in rows)]).split()
        justify: Literal["left", "right"] = "left" if index < left else "right"
        # The first column names the row and numbers are read as one word: only text wraps.
        wraps = 0 < index < left
        longest = max(map(len, words)) if wraps else None
        table.add_column(
            name, justify=justify, no_wrap=not wraps, overflow="fold", min_width=longest
        )
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    if console.is_terminal:
        if title:
            console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table, crop=False)
        return
    # rich pads every line to the table's width; a log or a grep has no use for that.
    page = io.StringIO()
    Console(file=page, width=_WIDE).print(table)
    lines = [title] * bool(title) + [line.rstrip() for line in page.getvalue().splitlines()]
    print("\n".join(lines), flush=True)

"""Tables on the terminal. Off a terminal they are as wide as they need to be, never cut."""

from collections.abc import Sequence

_WIDE = 200
STATUS_STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "lost": "red",
    "held": "yellow",
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

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(table)

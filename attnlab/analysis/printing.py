"""Printing for the console script."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

PLAIN_WIDTH = 160


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A rich table on a terminal, aligned text elsewhere; long cells wrap, nothing is cut off."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    shown = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    rows = [[str(cell) for cell in row] for row in rows]
    for i, title in enumerate(columns):
        words = [word for row in [columns, *rows] for word in row[i].split()]
        longest = max(map(len, words), default=1)
        shown.add_column(title, overflow="fold", min_width=min(longest, 20))
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console(width=None if terminal else PLAIN_WIDTH, highlight=False)
    with console.capture() as text:
        console.print(shown)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))

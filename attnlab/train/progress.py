"""What a person sees of a run: one bar on a terminal, one line a logged step elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class Reporter:
    """Console output of the first process; silent on the others."""

    def __init__(self, steps: int, *, first: bool, plain: bool):
        self.first = first
        self.console = Console(quiet=not first, highlight=False, soft_wrap=True)
        self.bar = None
        self._quiet_until = 0.0
        if first and not plain and sys.stdout.isatty():
            self.bar = Progress(*columns(), console=self.console)
            self.task = self.bar.add_task("train", total=steps, text="")
            self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def row(self, row: dict) -> None:
        """A logged step; without a terminal at most one line a second, evaluations always."""
        text = describe(row)
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], text=text)
            if row.get("val_loss") is not None:
                self.say(f"step {row['step']:>6}  {text}")
        elif row.get("val_loss") is not None or time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + 1.0
            self.say(f"step {row['step']:>6}  {text}")

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def columns() -> tuple[ProgressColumn, ...]:
    """Label, bar, M/N, text, time left; on a narrow terminal the text is cut."""
    # rich shrinks the columns that may wrap first, so these may not.
    count = MofNCompleteColumn(table_column=Column(no_wrap=True))
    left = TimeRemainingColumn(table_column=Column(no_wrap=True))
    return TextColumn("train"), BarColumn(bar_width=10), count, _Row(), left


class _Row(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


def describe(row: dict) -> str:
    parts = ["loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}"]
    if row.get("val_loss") is not None:
        parts.append(f"val {row['val_loss']:.4f} nats")
        if row.get("val_bits_per_byte") is not None:
            parts.append(f"{row['val_bits_per_byte']:.4f} bits/byte")
    if row.get("tokens_per_s"):
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("skipped"):
        parts.append(f"{row['skipped']} steps skipped")
    return "  ".join(parts)

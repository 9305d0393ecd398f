"""How far work on the data is: a line that is redrawn on a terminal, one every half minute in a log file."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class _Shown:
    """A line that stands on the terminal while the block runs."""

    progress: Progress

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class TokenizingProgress(_Shown):
    """Documents and tokens so far, and the rate. The end of a stream is not known before it comes."""

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.title = title
        self.task = self.progress.add_task(title)
        self.started = self.last_line = time.monotonic()

    def update(self, documents: int, tokens: int) -> None:
        """Show the totals so far."""
        now = time.monotonic()
        rate = tokens / max(now - self.started, 1e-9)
        text = f"{self.title}  {documents:,} documents  {tokens:,} tokens  {rate:,.0f} tokens/s"
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self.console.print(text, highlight=False, soft_wrap=True)


class TokensProgress(_Shown):
    """Tokens done of a known number, the rate and the time left."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self.console = Console(stderr=True)
        self.shown, self.title, self.total, self.done = shown, title, total, 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.task = self.progress.add_task(title, total=total, rate="")
        self.started = self.last_line = time.monotonic()

    def advance(self, tokens: int) -> None:
        """So many more are done."""
        self.done += tokens
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        self.progress.update(self.task, completed=self.done, rate=f"{rate:,.0f} tokens/s")
        if self.shown and not self.console.is_terminal and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            left = (self.total - self.done) / rate
            text = f"{self.title}  {self.done}/{self.total}  {rate:,.0f} tokens/s  left {left:.0f} s"
            self.console.print(text, highlight=False, soft_wrap=True)

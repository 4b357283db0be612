"""Progress bars for people; nothing when standard error is not a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


@contextmanager
def working(label: str) -> Generator[None, None, None]:
    """Show what is being done while it takes seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(label):
        yield


def track(results: Iterable[T], *, label: str, total: int, done: int = 0) -> Iterator[T]:
    """Pass `results` through and show how far they are; `done` of `total` were there before."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for result in results:
            bar.advance(task)
            yield result

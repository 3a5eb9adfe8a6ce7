"""Progress of a job in a terminal: a bar with the time that remains, or plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantlib.job import conversion

# Seconds between lines in a log file.
_LINE_EVERY_S = 15.0


@contextmanager
def progress_bar() -> Iterator[Callable[[conversion.Progress], None]]:
    """Gives the function to call as a job goes on; writes to stderr."""
    if sys.stderr.isatty():
        with _bar() as on_progress:
            yield on_progress
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Callable[[conversion.Progress], None]]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("start")
        yield lambda now: bar.update(task, description=now.label, completed=now.done, total=now.total)


class _Lines:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = 0.0

    def __call__(self, now: conversion.Progress) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed < self._next and now.done < now.total:
            return
        self._next = elapsed + _LINE_EVERY_S
        left = f", about {elapsed / now.done * (now.total - now.done):.0f} s left" if now.done else ""
        print(f"{100 * now.done / now.total:3.0f}% {now.label} ({elapsed:.0f} s{left})", file=sys.stderr)

"""Progress of a job in a terminal: a bar with the time that remains, or plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console

from quantlib.job.stages import Progress
from quantlib.job.time_left import TimeLeft, words_for

# Seconds between lines in a log file.
_LINE_EVERY_S = 15.0


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Gives the function to call as a job goes on; writes to stderr."""
    if sys.stderr.isatty():
        with _bar() as on_progress:
            yield on_progress
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    columns = (
        rich_progress.TextColumn("{task.description:<28}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        # Rich's own column judges by the last seconds, in which no stage of a large block has ended.
        rich_progress.TextColumn("{task.fields[left]}"),
    )
    left = TimeLeft()
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("start", left="")

        def show(now: Progress) -> None:
            words = words_for(left.seconds(now))
            bar.update(task, description=now.label, completed=now.done, total=now.total, left=words)

        yield show


class _Lines:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = 0.0
        self._left = TimeLeft()

    def __call__(self, now: Progress) -> None:
        elapsed = time.monotonic() - self._started
        left = words_for(self._left.seconds(now))
        if elapsed < self._next and now.done < now.total:
            return
        self._next = elapsed + _LINE_EVERY_S
        times = ", ".join(filter(None, (f"{elapsed:.0f} s", left)))
        print(f"{100 * now.done / now.total:3.0f}% {now.label} ({times})", file=sys.stderr)

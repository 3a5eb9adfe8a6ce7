"""Who else hears of a conversion's progress, beside the Prefect UI.

The command line runs the flow in its own process and draws a bar; a flow's parameters must be plain data, so
the bar's function cannot be one of them. It is held in a context variable instead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from quantlib.job.stages import Progress

Listener = Callable[[Progress], None]

_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)


@contextmanager
def progress_heard_by(listener: Listener) -> Iterator[None]:
    """Send the progress of flows called inside the block to ``listener`` too."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_listener(progress: Progress) -> None:
    """Pass progress on to whoever listens in this process."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)

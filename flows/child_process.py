"""Run a command of ``python -m quantlib`` as a child process.

`flows` never imports torch: planning, verifying and evaluating happen in a process of their own. The child
writes to this process's terminal, and its exit code is this command's.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def run_quantlib(arguments: Sequence[str]) -> int:
    """Run the command and wait for it; interrupts and terminations of this process are passed on to it.

    Args:
        arguments: Command and options, as typed.

    Returns:
        The exit code; 128 plus the signal's number when a signal ended the child.
    """
    # The child leads a process group of its own: a Ctrl-C in the terminal reaches this process only, and the
    # child gets it once.
    child = subprocess.Popen([sys.executable, "-m", "quantlib", *arguments], process_group=0)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code

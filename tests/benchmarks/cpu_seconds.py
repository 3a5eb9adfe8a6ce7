"""Runs a command and tells what it cost, counting every process it started, daemons included.

``time`` misses what outlives its parent, and Ray's daemons do; the figures of reaped children miss what the
parent never waits for, and Ray's raylet ignores SIGCHLD. So this process adopts orphans
(PR_SET_CHILD_SUBREAPER, Linux) and, twenty times a second, notes what every descendant has used so far
(/proc/PID/stat): the last note of each counts. What still runs some seconds after the command ended is
terminated by its process id, then reaped. Not seen: the last twentieth of a second of a process, and work
done for the command by servers that already ran.

    python tests/benchmarks/cpu_seconds.py [--json] [--grace SECONDS] -- COMMAND [ARGUMENT ...]

Exits with the command's status.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
_TERMINATION_TIMEOUT_S = 15.0


@dataclass(slots=True, kw_only=True)
class Cost:
    """What a command and all its descendants took.

    Attributes:
        wall_seconds: From start to the end of the command itself; waiting for daemons does not count.
        cpu_seconds: In user mode and in the kernel, over all processes.
        by_name: The same by name of the process, the dearest first.
        peak_rss_bytes: Largest resident size that a single process reached.
        processes: Descendants seen.
        terminated: How many of them had to be told to end.
        status: Exit status of the command; 128 + n when signal n ended it.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    by_name: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    processes: int = 0
    terminated: int = 0
    status: int = 0


@dataclass(slots=True)
class _Notes:
    """What every descendant had used when it was last seen, by process id and start time."""

    cost: Cost
    seen: dict[tuple[int, str], tuple[str, float]] = field(default_factory=dict)

    def take(self) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        for pid in descendants(os.getpid()):
            try:
                name, _, rest = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")
            except OSError:
                continue
            values = rest.split()
            used = (int(values[11]) + int(values[12])) / ticks
            self.seen[pid, values[19]] = (name.partition("(")[2], used)

    def total(self) -> None:
        by_name: dict[str, float] = {}
        for name, used in self.seen.values():
            by_name[name] = by_name.get(name, 0.0) + used
        self.cost.by_name = dict(sorted(by_name.items(), key=lambda item: -item[1]))
        self.cost.cpu_seconds = sum(by_name.values())
        self.cost.processes = len(self.seen)


def measure(command: list[str], grace_s: float) -> Cost:
    """Run a command until it and every descendant ended.

    Args:
        command: Program and arguments.
        grace_s: How long descendants may go on after the command ended.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this kernel lets no process adopt orphans")
    cost = Cost()
    notes = _Notes(cost)
    start = time.monotonic()
    child = subprocess.Popen(command)
    try:
        _reap_until(notes, child.pid, deadline=None)
        cost.wall_seconds = time.monotonic() - start
    finally:
        _end_leftovers(notes, child, grace_s)
        notes.total()
    return cost


def _end_leftovers(notes: _Notes, child: subprocess.Popen, grace_s: float) -> None:
    cost = notes.cost
    # subprocess must not wait for a child that was reaped behind its back.
    child.returncode = cost.status
    for limit_s, kind in ((grace_s, signal.SIGTERM), (_TERMINATION_TIMEOUT_S, signal.SIGKILL)):
        if _reap_until(notes, None, deadline=time.monotonic() + limit_s):
            return
        _signal(cost, kind)
    # A killed process may leave children, which are ours from then on.
    while not _reap_until(notes, None, deadline=time.monotonic() + 1.0):
        _signal(cost, signal.SIGKILL)


def _signal(cost: Cost, kind: signal.Signals) -> None:
    leftovers = descendants(os.getpid())
    if kind is signal.SIGTERM:
        cost.terminated = len(leftovers)
    for pid in leftovers:
        try:
            os.kill(pid, kind)
        except ProcessLookupError:
            continue


def _reap_until(notes: _Notes, pid: int | None, deadline: float | None) -> bool:
    """Reap until the process with this id ended (None: until no child is left); False past the deadline."""
    cost = notes.cost
    while True:
        notes.take()
        try:
            ended, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if ended == 0:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
            continue
        cost.peak_rss_bytes = max(cost.peak_rss_bytes, usage.ru_maxrss * 1024)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            cost.status = code if code >= 0 else 128 - code
            return True


def descendants(pid: int) -> list[int]:
    """Ids of all living descendants of a process, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold blanks; state and parent follow the last parenthesis.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def main() -> int:
    """Run the command on the command line; print its cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the cost as one line of JSON on stdout")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds daemons get to end by themselves")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("wanted a command after --, found none")
    cost = measure(command, arguments.grace)
    if arguments.json:
        print(json.dumps(asdict(cost)), flush=True)
        return cost.status
    print(
        f"wall {cost.wall_seconds:.1f} s, CPU {cost.cpu_seconds:.1f} s, largest reaped process"
        f" {cost.peak_rss_bytes / 2**30:.2f} GiB, {cost.processes} processes, {cost.terminated} terminated",
        file=sys.stderr,
    )
    return cost.status


if __name__ == "__main__":
    sys.exit(main())

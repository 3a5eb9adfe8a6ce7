"""The measuring tool counts what ``time`` misses: processes that outlive the command they were started by."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).with_name("cpu_seconds.py")

# Forks twice, so that the worker is nobody's child; the command itself ends at once.
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        {work}
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
sys.exit(3)
"""
BURN_ONE_SECOND = "while time.process_time() < 1.0: pass"
SLEEP_FOR_AN_HOUR = "time.sleep(3600)"


def measured(tmp_path: Path, work: str, *options: str) -> tuple[dict, int]:
    """Cost as the tool prints it, and the process id the daemon had."""
    marker = tmp_path / "pid"
    command = [sys.executable, "-c", DAEMON.format(work=work), str(marker)]
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", *options, "--", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    return json.loads(done.stdout), int(marker.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_cost_of_orphan_is_counted_and_awaited(tmp_path):
    cost, pid = measured(tmp_path, BURN_ONE_SECOND, "--grace", "60")
    assert cost["cpu_seconds"] >= 0.9
    assert cost["terminated"] == 0
    assert not is_alive(pid)


def test_daemon_left_over_is_terminated_and_reaped(tmp_path):
    cost, pid = measured(tmp_path, SLEEP_FOR_AN_HOUR, "--grace", "0.1")
    assert cost["terminated"] == 1
    assert not is_alive(pid)


def test_child_whose_parent_ignores_its_end_is_counted():
    inner = "import time\nwhile time.process_time() < 1.0: pass"
    outer = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(3)"
    )
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", "--", sys.executable, "-c", outer],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout)["cpu_seconds"] >= 0.9


def test_child_reaped_by_its_own_parent_is_counted_once():
    inner = "import time\nwhile time.process_time() < 1.0: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", "--", sys.executable, "-c", outer],
        capture_output=True,
        text=True,
        timeout=120,
    )
    cost = json.loads(done.stdout)
    assert 0.9 <= cost["cpu_seconds"] < 2.0
    assert cost["processes"] == 2


def test_peak_memory_is_that_of_the_largest_process():
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", "--", sys.executable, "-c", "bytearray(200_000_000)"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 200_000_000 <= json.loads(done.stdout)["peak_rss_bytes"] < 400_000_000

"""The `quantmill` command: what it refuses at once, and how it hands work to a child process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from tests.flows.conftest import clean_environment, stop, wait_until

QUANTMILL = Path(sys.executable).parent / "quantmill"
COMMANDS = ("plan", "quantize", "compare", "verify", "clean", "evaluate", "inspect", "report", "serve")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in COMMANDS)


def test_console_script_is_installed():
    shown = subprocess.run([QUANTMILL, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(name in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantize a b", "gptq needs calibration text"),
        ("quantize a b --method rtn --group-size 5", "group_size must be at least 8 or -1 or 0, found 5"),
        ("plan a b --method rtn --scheme W3", "scheme must be one of"),
        ("quantize a b --recipe none.toml", "recipe none.toml cannot be read"),
        ("quantize a --replay none.json", "takes both source and output, or neither"),
        ("quantize --replay none.json", "there is no file://"),
        ("compare a --schemes W4A16 --calibration c", "a comparison needs held-out text"),
        ("compare a --schemes rtn:W9A16 --evaluation e", "'rtn:W9A16': scheme must be one of"),
        ("compare a --schemes rtn:W4A16 --evaluation e --ray-address auto", "must reach the outputs"),
        ("clean out --storage-engine ftp", "storage_engine must be one of"),
        ("evaluate m --text t --sequence-length 2", "sequence_length must be at least 8"),
        ("inspect m --storage-engine ftp", "storage_engine must be one of"),
        ("serve --limit 0", "limit must be at least 1"),
    ],
)
def test_wrong_request_exits_2_with_one_line_and_loads_nothing_heavy(
    line, said, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("quantmill: error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not list(tmp_path.iterdir())


def test_verbose_adds_the_traceback(capsys):
    assert main(["quantize", "a", "b", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_flows_load_neither_torch_nor_ray():
    program = (
        "import sys, flows.cli, flows.deployments, flows.quantize_model\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "inspect {folder}/none",
        "plan {folder}/none {folder}/out --method rtn",
        "quantize {folder}/none {folder}/out --method rtn --runner inprocess",
        "verify {folder}/none --against {folder}/other",
        "clean {folder}/none --work {folder}/work --discard",
    ],
)
def test_child_process_answers_for_the_command(line, tmp_path):
    words = line.format(folder=tmp_path).split()
    ended = subprocess.run([QUANTMILL, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("quantmill: error: ")
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_termination_reaches_the_child_process(tmp_path):
    # The child spends seconds loading torch before it looks at the address.
    process = subprocess.Popen([QUANTMILL, "inspect", str(tmp_path)], start_new_session=True)
    try:
        wait_until(lambda: _catches(process.pid, signal.SIGTERM), 60, "the start of the child")
        (child,) = _children(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{child}").exists()
    finally:
        stop(process)


_SWALLOWS_CANCELLATION = """
import asyncio, os, signal
from flows.cli import hear_interrupts

async def deaf():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        pass

hear_interrupts()
try:
    asyncio.run(deaf())
except KeyboardInterrupt:
    print("heard")
"""


def test_interrupt_is_heard_where_asyncio_runs_what_swallows_cancellation():
    done = subprocess.run(
        [sys.executable, "-c", _SWALLOWS_CANCELLATION], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "heard\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", ["serve", "quantize a b --method rtn"])
def test_a_server_that_does_not_answer_exits_2(line, tmp_path):
    environment = clean_environment(tmp_path) | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    ended = subprocess.run(
        [QUANTMILL, *line.split()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert "http://127.0.0.1:9/api does not answer" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_serve_without_a_server_tells_how_to_start_one(tmp_path):
    ended = subprocess.run(
        [QUANTMILL, "serve"], env=clean_environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert "prefect server start" in ended.stderr
    assert ended.stderr.count("\n") == 1

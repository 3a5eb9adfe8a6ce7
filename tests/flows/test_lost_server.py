"""The Prefect server lost in the middle of a run: the conversion goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import running_prefect_server, wait_until
from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow
_START_S, _END_S = 300, 300
_SETTINGS = {
    "--group-size": "32",
    "--sequences": "6",
    "--sequence-length": "32",
    "--evaluation-sequences": "2",
    "--workers": "1",
    "--threads-per-worker": "1",
    "--device": "cpu",
}


def test_server_killed_in_the_middle_costs_no_output(tmp_path):
    source = tiny_source(tmp_path / "deep", num_hidden_layers=32)
    texts = [str(tiny_text(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in (1, 2)]
    output, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    command = [str(Path(sys.executable).parent / "quantmill"), "quantize", str(source), str(output)]
    flags = {"--calibration": texts[0], "--evaluation": texts[1], **_SETTINGS}
    words = [*command, *(word for pair in flags.items() for word in pair)]

    def num_records() -> int:
        return len(list(Path(f"{output}.quantmill").glob("done/*.json")))

    with running_prefect_server(home) as (server, process), (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            words, env=server.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until(lambda: num_records() >= 2 or running.poll() is not None, _START_S, "two units")
            os.killpg(process.pid, signal.SIGKILL)
            assert not (output / "config.json").exists()
            wait_until((output / "config.json").exists, _END_S, "the rest of the conversion")
        finally:
            # Prefect's client, which has a state and events to tell, goes on for long.
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert (output / "quantmill_report.html").exists()

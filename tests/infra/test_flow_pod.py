"""`infra/prefect/flow-pod` on a real Ray cluster: it joins, runs a command, passes signals on, and leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tests.flows.conftest import stop, wait_until
from tests.support.ray_nodes import RayNodes

SCRIPT = Path(__file__).resolve().parents[2] / "infra/prefect/flow-pod"
_RUN_S = 180

_SHOW_NODES = """
import json, sys, ray

@ray.remote(num_cpus=1)
def seven():
    return 7

ray.init(log_to_driver=False)
cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
print(json.dumps({"cpus": cpus, "answer": ray.get(seven.remote())}))
sys.exit(5)
"""

_WAIT_FOR_SIGNAL = """
import signal, sys, time
for number, code in ((signal.SIGTERM, 7), (signal.SIGINT, 8)):
    signal.signal(number, lambda *_, code=code: sys.exit(code))
print("waits", flush=True)
time.sleep(600)
"""


def environment(address: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "RAY_ADDRESS": address, "PATH": path}


def run(address: str, *command: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *command], env=environment(address) | more, capture_output=True, text=True, timeout=_RUN_S
    )


def nodes_without_cpus() -> int:
    return sum(1 for node in ray.nodes() if node["Alive"] and not node["Resources"].get("CPU"))


@pytest.mark.slow
def test_command_runs_on_a_node_more_which_offers_nothing(running_nodes: RayNodes):
    before = sum(1 for node in ray.nodes() if node["Alive"])
    ended = run(running_nodes.address, sys.executable, "-c", _SHOW_NODES)
    assert ended.returncode == 5, ended.stderr
    shown = json.loads(ended.stdout)
    assert len(shown["cpus"]) == before + 1
    assert shown["cpus"].count(0) == 1
    assert shown["answer"] == 7
    wait_until(lambda: nodes_without_cpus() == 0, 30, "the node's leave")


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, 8)])
def test_signal_ends_the_command_and_then_the_node(running_nodes: RayNodes, sent, code):
    process = subprocess.Popen(
        [SCRIPT, sys.executable, "-c", _WAIT_FOR_SIGNAL],
        env=environment(running_nodes.address),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        assert nodes_without_cpus() == 1
        os.kill(process.pid, sent)
        assert process.wait(60) == code
        wait_until(lambda: nodes_without_cpus() == 0, 30, "the node's leave")
    finally:
        stop(process)


@pytest.mark.slow
def test_cluster_that_does_not_answer_is_told_and_the_command_not_started(tmp_path):
    ended = run("127.0.0.1:9", "touch", str(tmp_path / "started"), FLOW_POD_JOIN_TIMEOUT_S="5")
    assert ended.returncode == 1
    assert "could not join the Ray cluster at 127.0.0.1:9" in ended.stderr
    assert not (tmp_path / "started").exists()


def test_without_an_address_the_command_runs_by_itself():
    ended = run("", "sh", "-c", "exit 4")
    assert ended.returncode == 4


def test_without_a_command_it_tells_how_it_is_called():
    ended = run("127.0.0.1:9")
    assert ended.returncode == 2
    assert "flow-pod COMMAND" in ended.stderr

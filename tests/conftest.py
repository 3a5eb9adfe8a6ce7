"""Fixtures that every test may use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.s3_server import S3Server, running_s3_server

if TYPE_CHECKING:
    from tests.support.ray_nodes import RayNodes

RAY_NODES = 3

# How long an example takes says how busy the machine is.
settings.register_profile("quantmill", deadline=None)
settings.load_profile("quantmill")
# Whoever starts the tests in the background of a script has them ignore it, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Read when Triton is imported, which other packages do as well; without a GPU kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: on tiny models several wait for each other longer than they compute."""
    # Most tests need no torch, which takes seconds to import.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS server for the whole run."""
    with running_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the AWS_* environment of this process (and of its children) pointing at it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def running_nodes() -> "Iterator[RayNodes]":
    """One Ray cluster of three nodes for the whole run; this process is a driver of it."""
    # Ray takes a second to load, which the fast tests need not wait for.
    from tests.support.ray_nodes import ray_nodes

    with ray_nodes(RAY_NODES) as nodes:
        yield nodes


@pytest.fixture
def ray_cluster(running_nodes: "RayNodes") -> "RayNodes":
    """The cluster with all its nodes, whatever the test before did to them."""
    running_nodes.refill(RAY_NODES)
    return running_nodes

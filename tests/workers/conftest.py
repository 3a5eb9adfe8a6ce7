"""One Ray cluster of three nodes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.support.ray_nodes import RayNodes, ray_nodes

NODES = 3


@pytest.fixture(scope="session")
def running_nodes() -> Iterator[RayNodes]:
    with ray_nodes(NODES) as nodes:
        yield nodes


@pytest.fixture
def ray_cluster(running_nodes: RayNodes) -> RayNodes:
    """The cluster with all its nodes, whatever the test before did to them."""
    running_nodes.refill(NODES)
    return running_nodes

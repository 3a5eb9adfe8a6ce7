"""A real Ray cluster of several nodes on this machine, for tests that kill workers and remove nodes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

CPUS_PER_NODE = 2
_OBJECT_STORE_BYTES = 100 << 20


class RayNodes:
    """The cluster; this process is connected to it as a driver.

    Attributes:
        address: For ``ray_address`` of other drivers.
    """

    def __init__(self, count: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={**_node(), "include_dashboard": False})
        self._others = [self._cluster.add_node(**_node()) for _ in range(count - 1)]
        self.address: str = self._cluster.address

    def node_of(self, actor_node_id: str) -> Any:
        """The node with this id, unless it is the head, which cannot be spared."""
        return next((node for node in self._others if node.node_id == actor_node_id), None)

    def remove(self, node: Any, *, is_graceful: bool = False) -> None:
        """Take a node away: as a power cut would, or with its leave, which Ray notices sooner."""
        self._cluster.remove_node(node, allow_graceful=is_graceful)
        self._others.remove(node)

    def add(self, **facts: Any) -> Any:
        """One node more, with labels, custom resources or GPUs that only Ray believes in."""
        self._others.append(self._cluster.add_node(**_node(), **facts))
        return self._others[-1]

    def refill(self, count: int) -> None:
        """Bring the cluster back to this many nodes, all alive."""
        while len(self._others) < count - 1:
            self._others.append(self._cluster.add_node(**_node()))
        self._cluster.wait_for_nodes()

    def shutdown(self) -> None:
        """End every node."""
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """Start a cluster and connect to it as `workers.resources.cluster` would."""
    os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
    nodes = RayNodes(count)
    try:
        ray.init(
            address=nodes.address,
            log_to_driver=False,
            runtime_env={"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}},
        )
        yield nodes
    finally:
        nodes.shutdown()


def _node() -> dict[str, Any]:
    return {"num_cpus": CPUS_PER_NODE, "object_store_memory": _OBJECT_STORE_BYTES}

"""Bytes on their way: between storage and nodes, and from node to node.

All links carry both ways at once. A worker reads and writes one thing at a time, as its storage lane does.
"""

from collections.abc import Mapping, Sequence

from quantlib.simulation.clock import Link
from quantlib.simulation.hardware import Cluster


class Exchange:
    """The links of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._from_storage, self._to_storage, self._incoming, self._outgoing = (
            [Link(rate) for _ in range(cluster.num_nodes)]
            for rate in 2 * [cluster.storage_bytes_per_s] + 2 * [cluster.network_bytes_per_s]
        )
        # When each worker's storage lane has done what it was given so far.
        self._lanes = [0.0] * cluster.num_workers

    @property
    def read_bytes(self) -> float:
        """From storage so far."""
        return sum(link.carried_bytes for link in self._from_storage)

    @property
    def written_bytes(self) -> float:
        """To storage so far."""
        return sum(link.carried_bytes for link in self._to_storage)

    @property
    def network_bytes(self) -> float:
        """Between nodes so far."""
        return sum(link.carried_bytes for link in self._incoming)

    def read(self, now: float, size_bytes: float) -> float:
        """Something in equal parts, one a worker; gives when the last one is there."""
        share = size_bytes / self._cluster.num_workers
        by_lane = sorted(range(self._cluster.num_workers), key=lambda worker: self._lanes[worker])
        return max(self.read_part(now, worker, share) for worker in by_lane)

    def read_part(self, now: float, worker: int, size_bytes: float) -> float:
        """Something on one worker; gives when it is there."""
        link = self._from_storage[self._cluster.node_of(worker)]
        self._lanes[worker] = link.carry(max(now, self._lanes[worker]), size_bytes)
        return self._lanes[worker]

    def write(self, now: float, worker: int, size_bytes: float) -> float:
        """Something from one worker; gives when it is stored."""
        link = self._to_storage[self._cluster.node_of(worker)]
        self._lanes[worker] = link.carry(max(now, self._lanes[worker]), size_bytes)
        return self._lanes[worker]

    def reduce(self, now: float, nodes: Sequence[int], size_bytes: float) -> float:
        """Add up what the nodes have, in equal parts on each; gives when they are there."""
        moved = size_bytes * (len(nodes) - 1) / len(nodes)
        links = [link for node in nodes for link in (self._outgoing[node], self._incoming[node])]
        return max(link.carry(now, moved) for link in links)

    def gather(self, now: float, node: int, size_bytes: Mapping[int, float]) -> float:
        """What other nodes have, on one; gives when all of it is there.

        Args:
            size_bytes: Node -> bytes that are there; what the node has itself does not travel.
        """
        remote = {sender: size for sender, size in size_bytes.items() if sender != node}
        sent = [self._outgoing[sender].carry(now, size) for sender, size in remote.items()]
        return max([self._incoming[node].carry(now, sum(remote.values())), *sent])

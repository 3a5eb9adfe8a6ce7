"""How work is dealt out evenly."""

from collections.abc import Sequence


def share_by_cost(costs: Sequence[float], num_workers: int) -> list[list[int]]:
    """Indices for every worker, the dearest first to whoever has least; each worker's in rising order.

    >>> share_by_cost([5.0, 1.0, 3.0, 3.0], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        worker = loads.index(min(loads))
        shares[worker].append(index)
        loads[worker] += costs[index]
    return [sorted(share) for share in shares]

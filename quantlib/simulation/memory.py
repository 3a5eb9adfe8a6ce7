"""What a simulated job needs of a GPU's memory, and of a node's for sums on their way."""

from collections import Counter

from quantlib.job.bands import MAX_DIRECT_BATCHES
from quantlib.simulation.costs import CODE_BYTES, WIDE_BYTES, Costs
from quantlib.simulation.hardware import Cluster
from quantlib.simulation.shapes import BlockShape, GroupShape

# Of an entry of an input group's matrices while they are made: a cell's part in fp32; matrix and factor while
# they are solved; a weight of a row tile with its transpose and its errors.
_PARTIAL_BYTES, _FACTOR_BYTES, _SOLVED_BYTES = 4, 8, 12


def gpu_memory(costs: Costs, num_workers: int) -> dict[str, int]:
    """Bytes by purpose on the GPU that needs most, at the largest block; what a forward makes is left out."""
    work, blocks = costs.workload, costs.shape.blocks
    two_live = bool(work.evaluation_sequences) or work.propagation == "quantized"
    streams = [
        costs.cell_bytes(cells[0], is_evaluation=is_evaluation) * -(-len(cells) // num_workers)
        for cells, is_evaluation in (
            (work.cells(work.sequences), False),
            (work.cells(work.evaluation_sequences), True),
        )
        if cells
    ]
    partial = _PARTIAL_BYTES * (2 if work.correct_targets else 1)
    found = {
        "block": max(block.source_bytes for block in blocks) * (1 + two_live),
        "sums": max(
            sum(costs.sum_bytes(group) + partial * group.columns**2 for group in block.groups)
            for block in blocks
        ),
        "activations": sum(streams),
        "solve": max((_solve_bytes(block) for block in blocks), default=0),
    }
    return {**found, "total": sum(found.values())}


def _solve_bytes(block: BlockShape) -> int:
    counts = Counter(group.likeness for group in block.groups)

    def together(group: GroupShape) -> int:
        return min(group.likeness.most, counts[group.likeness]) if group.likeness else 1

    return max(
        (
            together(group)
            * (
                _FACTOR_BYTES * group.columns**2
                + (_SOLVED_BYTES + WIDE_BYTES) * max(group.tiles) * group.columns
                + CODE_BYTES * group.weights
            )
            for group in block.groups
        ),
        default=0,
    )


def node_sums_bytes(costs: Costs, cluster: Cluster) -> int:
    """Sums in the memory of a node: those of its own workers, and what they are added up to."""
    cells = len(costs.workload.cells(costs.workload.sequences))
    observers = min(cells, cluster.num_workers)
    own = min(observers, cluster.gpus_per_node)
    # The node's, and from where there are others what all nodes' come to; or what few of them have.
    others = 1 + (observers > own) if observers > MAX_DIRECT_BATCHES else observers - own

    def held(block: BlockShape) -> int:
        return (own + others) * sum(costs.sum_bytes(group) for group in block.groups)

    return max(held(block) for block in costs.shape.blocks)
